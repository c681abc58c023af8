"""Contrastive losses over embeddings that are spread over the data-parallel ranks."""

from parallel_clip.loss.infonce import ClipLoss
from parallel_clip.loss.sigmoid import SigLipLoss

__all__ = ["ClipLoss", "SigLipLoss"]
