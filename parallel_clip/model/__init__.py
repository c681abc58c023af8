"""The two towers: what they are (architectures.py) and how they are built."""
