"""The weighted mean of the weights of several checkpoints of one model: between two as in WiSE-FT
(Wortsman et al., arXiv 2109.01903), of more as in model soups (arXiv 2203.05482)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

from parallel_clip.convert.choose_model import resolve_preprocess
from parallel_clip.convert.model_weights import ModelWeights
from parallel_clip.convert.training_facts import MixedFacts, short_path
from parallel_clip.data.samples.transforms import Preprocess
from parallel_clip.errors import InputError
from parallel_clip.model.architecture import parameter_table

_SHARE = re.compile(r"\d+/\d+|(\d+\.?\d*|\.\d+)([eE]-?\d{1,3})?")


@dataclass(frozen=True)
class MixedPart:
    """A checkpoint of a mean. path: as the user named it; share: of the result; averages: whether
    its averages are taken."""

    path: Path
    share: Fraction
    weights: ModelWeights
    averages: bool = False

    def __str__(self) -> str:
        kind = ", its averages" if self.averages else ""
        return f"{float(self.share):.4g} of {self.path}{kind}"

    @property
    def facts(self) -> MixedFacts:
        metadata = self.weights.metadata
        words = [short_path(str(self.path))]
        words += [f"step {metadata.step:,}"] if metadata.step else []
        words += ["averages"] if self.averages else []
        return MixedFacts(", ".join(words), float(self.share), metadata.training)


def read_shares(given: Sequence[str | float]) -> list[Fraction]:
    """The share of the first checkpoint, which is what the others leave, and theirs.

    given: of the others: each a number or text such as "0.25" or "1/3".

    Raises:
        InputError: one is not above 0 and at most 1, or together they are more than 1.
    """
    shares = [_read_share(share) for share in given]
    left = 1 - sum(shares)
    if left < 0:
        raise InputError(
            f"the shares of --mix are {float(sum(shares)):.6g} together; they are parts of the "
            "result, of which SOURCE has what they leave, so at most 1"
        )
    return [left, *shares]


def _read_share(given: str | float) -> Fraction:
    text = str(given).strip()
    try:
        share = Fraction(text) if _SHARE.fullmatch(text) else Fraction(0)
    except ZeroDivisionError:
        share = Fraction(0)
    if not 0 < share <= 1:
        raise InputError(
            f"--mix: {given} is no share of the result: a number above 0 and at most 1, such as "
            "0.5 or 1/3"
        )
    return share


def _other_preprocessing(parts: Sequence[MixedPart], preprocess: Preprocess) -> Iterator[str]:
    for part in parts[1:]:
        metadata = part.weights.metadata
        if metadata.preprocess is None:
            continue
        said = [(str(metadata.said_by), metadata.preprocess)]
        own, words = resolve_preprocess(part.weights.architecture.vision.image_size, said)
        if own != preprocess:
            yield f"the preprocessing of {part.path} differs, and is left behind: {words}"


class MixedSource:
    """The mean of the weights of `parts` as a source, under their global names.

    A read holds the mean of one tensor and that tensor of one part beside it. A value that is the
    same in all parts stays the same. Model and tokenizer are the first's.

    preprocess: that of the result. Its notes are those of the others, and of what they are.
    """

    content = None

    def __init__(self, parts: Sequence[MixedPart], preprocess: Preprocess):
        self._parts = [part for part in parts if part.share > 0]
        self._architecture = parts[0].weights.architecture
        notes = tuple(note for part in parts[1:] for note in part.weights.notes)
        words = "; ".join(str(part) for part in parts)
        notes += tuple(_other_preprocessing(parts, preprocess))
        notes += (f"mean of weights: {words}; logit_scale, a logarithm, is averaged as it stands",)
        self.metadata = replace(parts[0].weights.metadata, training=None, notes=notes)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {p.name: p.shape for p in parameter_table(self._architecture)}

    def read(self, name: str) -> Tensor:
        """The mean of a tensor: fp32. InputError where a part's is not finite."""
        first, *others = self._parts
        mean = first.weights.read(name).to(torch.float32, copy=True)
        behind = first.share
        for part in others:
            behind += part.share
            # The mean of those so far, moved towards the next.
            mean.lerp_(part.weights.read(name).float(), float(part.share / behind))
        return mean
