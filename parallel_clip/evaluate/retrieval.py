"""Retrieval: which captions belong to a picture, and which picture to a caption."""

from __future__ import annotations

from parallel_clip.evaluate.metrics import retrieval_recalls
from parallel_clip.evaluate.pairs import PairFeatures


def retrieval(features: PairFeatures) -> dict[str, float | int]:
    """Recall at 1, 5 and 10 both ways, from 0 to 1, and over how many `images` and `texts`."""
    return {
        **retrieval_recalls(features.images, features.texts, features.owner),
        "images": len(features.images),
        "texts": len(features.texts),
        "bad_samples": features.bad_samples,
    }
