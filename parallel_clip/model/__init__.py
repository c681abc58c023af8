"""The two towers: what they are (architectures.py) and how they are built."""

from parallel_clip.model.towers.patch_dropout import kept_patches

__all__ = ["kept_patches"]
