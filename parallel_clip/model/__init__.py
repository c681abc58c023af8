"""The CLIP model: what it is (architecture.py, towers/) and a rank's slice of it (clip.py)."""

from parallel_clip.model.towers.patch_dropout import kept_patches

__all__ = ["kept_patches"]
