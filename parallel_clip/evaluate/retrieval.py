"""Image-text retrieval: recall at 1, 5 and 10 in both directions."""

from __future__ import annotations

from torch import Tensor

from parallel_clip.evaluate.pairs import PairFeatures
from parallel_clip.evaluate.ranking import image_to_text_ranks, recall, text_to_image_ranks

RECALLS = (1, 5, 10)


def retrieval(features: PairFeatures) -> dict[str, float | int]:
    """The figures of `evaluate retrieval`: recalls from 0 to 1, and counts."""
    return {
        **retrieval_recalls(features.images, features.texts, features.owner),
        "images": len(features.images),
        "texts": len(features.texts),
        "bad_samples": features.bad_samples,
    }


def retrieval_recalls(images: Tensor, texts: Tensor, owner: Tensor) -> dict[str, float]:
    """Recalls by name, from 0 to 1; arguments as in `image_to_text_ranks`."""
    directions = {
        "image_to_text": image_to_text_ranks(images, texts, owner),
        "text_to_image": text_to_image_ranks(images, texts, owner),
    }
    return {
        f"{name}_recall@{k}": recall(ranks, k)
        for name, ranks in directions.items()
        for k in RECALLS
    }
