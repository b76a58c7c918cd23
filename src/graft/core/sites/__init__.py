"""Kinds of hosts that own a matrix, and the maps that a delta may apply there. Each file here is found by itself.

Precision: a delta keeps float32 tensors beside a half-precision base. Every map computes in the dtype of its input and
casts the delta's small tensors to it, so that no activation is kept twice for backward.
"""
