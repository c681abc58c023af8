"""Which bytes a published figure may be of: "ViT-H/14, 2-way tensor: 4.7 to 2.5 GB, 0.53".

It does not say whether weights, gradients, moments or activations are counted, of one tower or of
both, in GB or GiB. Sets of bytes that are the same for each parameter are compared with it by
arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from rich.console import Console
from rich.table import Table

from parallel_clip.model.architecture import Architecture, parameter_table

MODEL, TENSOR = "ViT-H-14", 2
PUBLISHED = "4.7 to 2.5 GB, 0.53"
BOTH = ("vision", "text", "logit_scale")
# What a set is, the parts of the model that it is of, and its bytes a parameter.
SETS = [
    ("bf16 weights", BOTH, 2),
    ("fp32 weights", BOTH, 4),
    ("bf16 weights, fp32 gradients", BOTH, 6),
    ("weights, gradients, optimizer", BOTH, 18),
    ("fp32 weights of the vision tower", ("vision",), 4),
    ("fp32 weights and gradients of the vision tower", ("vision",), 8),
]


@dataclass(frozen=True)
class HeadlineRow:
    """Bytes unsplit and of a tensor rank; with_whole_embedding: of one that has all of the token
    embedding, as where the vocabulary is not split."""

    what: str
    unsplit: int
    split: int
    with_whole_embedding: int

    @property
    def ratio(self) -> float:
        return self.split / self.unsplit

    @property
    def ratio_with_whole_embedding(self) -> float:
        return self.with_whole_embedding / self.unsplit

    def as_dict(self) -> dict[str, Any]:
        return {
            "what": self.what,
            "unsplit": self.unsplit,
            "split": self.split,
            "ratio": self.ratio,
            "with_whole_embedding": self.with_whole_embedding,
            "ratio_with_whole_embedding": self.ratio_with_whole_embedding,
        }


def headline_rows(architecture: Architecture) -> list[HeadlineRow]:
    return [
        HeadlineRow(what, *(size * count for count in _numbers(architecture, parts)))
        for what, parts, size in SETS
    ]


def _numbers(architecture: Architecture, parts: Sequence[str]) -> tuple[int, int, int]:
    """Numbers of the parameters: all, of a tensor rank, and of one with the whole embedding."""
    unsplit = split = with_embedding = 0
    for parameter in parameter_table(architecture):
        if parameter.module.partition(".")[0] not in parts:
            continue
        count = prod(parameter.shape)
        of_rank = count if parameter.placement.axis is None else -(-count // TENSOR)
        unsplit += count
        split += of_rank
        with_embedding += count if "token_embedding" in parameter.module else of_rank
    return unsplit, split, with_embedding


def print_headline(console: Console, rows: Sequence[HeadlineRow]) -> None:
    table = Table(
        title=f'{MODEL}, tensor {TENSOR}, beside a published "{PUBLISHED}"', title_justify="left"
    )
    table.add_column("bytes of")
    columns = "GB", f"tensor {TENSOR}", "ratio", "GiB", f"tensor {TENSOR}", "ratio, embedding whole"
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        in_gb = (f"{size / 1e9:.2f}" for size in (row.unsplit, row.split))
        in_gib = (f"{size / 2**30:.2f}" for size in (row.unsplit, row.split))
        last = f"{row.ratio_with_whole_embedding:.3f}"
        table.add_row(row.what, *in_gb, f"{row.ratio:.3f}", *in_gib, last)
    console.print(table)
    console.print("no set of bytes gives both its 4.7 and its 0.53\n")
