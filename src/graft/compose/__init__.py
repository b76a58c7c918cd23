"""Deltas that contain deltas."""
