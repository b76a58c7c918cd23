"""Deltas that contain deltas, and the algebra of adapters."""
