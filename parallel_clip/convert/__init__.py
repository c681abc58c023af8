"""Checkpoints of other formats, read and written: one file a format."""
