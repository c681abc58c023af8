"""Decode a sample: its picture to a tensor, its captions to tokens."""
