"""Model-parallel training of CLIP-like dual encoders."""

__version__ = "0.1.0"
