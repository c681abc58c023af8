"""Image-text retrieval: encode held-out images and all their captions, and recall both ways."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from parallel_clip.data.feeding.evaluation_data import EvaluationBatch
from parallel_clip.engine.collectives import gather_rows
from parallel_clip.evaluate.bad_samples import BadSamples
from parallel_clip.evaluate.encoder import Encoder, encode_pictures
from parallel_clip.evaluate.interrupt import Iterate
from parallel_clip.evaluate.ranking import image_to_text_ranks, recall, text_to_image_ranks

RECALLS = (1, 5, 10)


@dataclass(frozen=True)
class PairFeatures:
    """Normalised features fp32, in the order of the shards and the same on every rank.

    images [N, D]; texts [M, D], those of one image side by side; owner [M] int64: the image of each
    caption, at least one for every image; bad_samples: how many were left out.
    """

    images: Tensor
    texts: Tensor
    owner: Tensor
    bad_samples: int

    def first_captions(self) -> Tensor:
        """The features of each image's first caption: [N, D]."""
        captions = torch.bincount(self.owner, minlength=len(self.images))
        return self.texts[captions.cumsum(0) - captions]


@torch.no_grad()
def encode_pairs(
    encoder: Encoder,
    batches: Iterable[EvaluationBatch],
    text_batch: int = 64,
    group: ProcessGroup | None = None,
    iterate: Iterate = iter,
) -> PairFeatures:
    """Encode this rank's part of the samples, and gather the parts of all ranks of `group`.

    The parts follow one another in the order of ranks. Texts are encoded `text_batch` at a time.
    iterate: what goes through the batches.

    Raises:
        InputError: too many samples are bad, on every rank; see `BadSamples`.
    """
    device, width = encoder.device, encoder.architecture.embed_dim
    images, texts = [torch.empty(0, width, device=device)], [torch.empty(0, width, device=device)]
    owners = [torch.empty(0, dtype=torch.int64)]
    pictures, bad = 0, BadSamples()
    for batch in iterate(batches):
        bad.add(batch)
        if len(batch.images):
            images.append(encode_pictures(encoder, batch.images))
            texts += [encoder.encode_text(t.to(device)) for t in batch.tokens.split(text_batch)]
        owners.append(batch.owner + pictures)
        pictures += len(batch.images)
    bad.check_limit(group, "retrieval and loss need a picture and its captions")

    own_images, own_texts = (
        encoder.broadcast_from_last_stage(torch.cat(f)) for f in (images, texts)
    )
    captions = torch.bincount(torch.cat(owners).to(device), minlength=pictures)
    all_captions = gather_rows(captions, group)
    everyone = torch.arange(len(all_captions), device=device)
    return PairFeatures(
        images=gather_rows(own_images, group),
        texts=gather_rows(own_texts, group),
        owner=everyone.repeat_interleave(all_captions),
        bad_samples=bad.total,
    )


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
