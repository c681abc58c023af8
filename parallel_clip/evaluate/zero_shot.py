"""Zero-shot classification: top-1 and top-5 accuracy over classes that are encoded as prompts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from parallel_clip.data.feeding.evaluation_data import EvaluationBatch
from parallel_clip.engine.collectives import gather_rows, raise_on_all_ranks
from parallel_clip.errors import InputError
from parallel_clip.evaluate.bad_samples import BadSamples
from parallel_clip.evaluate.encoder import Encoder, encode_pictures
from parallel_clip.evaluate.interrupt import Iterate
from parallel_clip.evaluate.prompts import fill
from parallel_clip.evaluate.ranking import class_ranks, recall


@torch.no_grad()
def encode_classes(
    encoder: Encoder,
    names: Sequence[str],
    templates: Sequence[str],
    batch: int = 64,
    group: ProcessGroup | None = None,
    iterate: Iterate = iter,
) -> Tensor:
    """Normalised features of the classes, fp32 [C, D], the same on every rank.

    A class is the mean of the features of all its prompts. Each rank of `group` encodes a part of
    the classes, `batch` prompts at a time. iterate: what goes through these.
    """
    rank, ranks = (0, 1) if group is None else (group.rank(), group.size())
    own_names = names[len(names) * rank // ranks : len(names) * (rank + 1) // ranks]
    prompts = [fill(template, name) for name in own_names for template in templates]
    features = [torch.empty(0, encoder.architecture.embed_dim, device=encoder.device)]
    for start in iterate(range(0, len(prompts), batch)):
        tokens = encoder.tokenizer(prompts[start : start + batch])
        features.append(encoder.encode_text(tokens.to(encoder.device)))
    of_prompts = encoder.broadcast_from_last_stage(torch.cat(features)).unflatten(
        0, (len(own_names), len(templates))
    )
    return gather_rows(F.normalize(of_prompts.mean(dim=1), dim=-1), group)


@torch.no_grad()
def zero_shot(
    encoder: Encoder,
    batches: Iterable[EvaluationBatch],
    classes: Tensor,
    group: ProcessGroup | None = None,
    iterate: Iterate = iter,
) -> dict[str, float | int]:
    """The figures of `evaluate zero-shot`: `top1` and `top5` from 0 to 1, and counts.

    batches: this rank's part of the samples; classes fp32 [C, D]: from `encode_classes`; iterate:
    what goes through the batches.

    Raises:
        InputError: a label is beyond the classes, or too many samples are bad (see `BadSamples`);
            on every rank.
    """
    ranks = [torch.empty(0, dtype=torch.int64, device=encoder.device)]
    bad = BadSamples()
    with raise_on_all_ranks(group):
        for batch in iterate(_with_known_labels(batches, len(classes))):
            bad.add(batch)
            if len(batch.images):
                images = encode_pictures(encoder, batch.images)
                ranks.append(class_ranks(images, classes, batch.labels.to(encoder.device)))
    bad.check_limit(
        group, "zero-shot classification needs a picture and the number of its class, .cls"
    )

    all_ranks = gather_rows(encoder.broadcast_from_last_stage(torch.cat(ranks)), group)
    return {
        "top1": recall(all_ranks, 1),
        "top5": recall(all_ranks, 5),
        "samples": len(all_ranks),
        "classes": len(classes),
        "bad_samples": bad.total,
    }


def _with_known_labels(
    batches: Iterable[EvaluationBatch], classes: int
) -> Iterator[EvaluationBatch]:
    for batch in batches:
        beyond = (batch.labels >= classes).nonzero()
        if len(beyond):
            row = int(beyond[0])
            address = batch.addresses[row]
            raise InputError(
                f"sample {address.key} of {address.shard} has label {int(batch.labels[row])} in "
                f"its .cls, but the classes are 0 to {classes - 1}; the file of class names needs "
                "a line for every label"
            )
        yield batch
