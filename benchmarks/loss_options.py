"""What duplicates and label smoothing cost: time of ours beside that of the same loss without.

    python benchmarks/loss_options.py [--rounds 15]

As in loss.py: forward and backward of the loss alone, over gloo in 1 and 2 processes of one thread
each, all in turn in each round, medians of the ratios of a round. Prints tables; exit code 1 where
a batch without duplicates takes longer than the bar, which is for 1,024 pairs a process and more.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial

import torch
from common import describe, environment
from loss import LARGE, print_table, rows_of, run
from rich.console import Console
from torch import Tensor

from parallel_clip.loss import ClipLoss, SigLipLoss

SIZES = [(256, 512), LARGE]  # b, D
PROCESSES = [1, 2]
WAYS = {
    "stored": (ClipLoss, {"exchange": "gather"}),
    "tiled": (ClipLoss, {"exchange": "gather", "tile": 1024}),
    "sigmoid": (SigLipLoss, {}),
}
OPTIONS = {
    "stored": ("no duplicates", "duplicates", "smoothed", "duplicates, smoothed"),
    "tiled": ("no duplicates", "duplicates", "smoothed", "duplicates, smoothed"),
    "sigmoid": ("no duplicates", "duplicates"),
}
PEERS = {f"{way}, {option}": way for way, options in OPTIONS.items() for option in options}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    console = Console(width=None if sys.stdout.isatty() else 120)
    rows = []
    for processes in PROCESSES:
        found = run(processes, SIZES, rounds, losses_of)
        for size, of_size in zip(SIZES, found, strict=True):
            of_size = rows_of(processes, *size, of_size, PEERS)
            print_table(console, of_size)
            rows += of_size
    console.print(describe(environment()), style="dim", highlight=False)
    return 1 if any(row.missed for row in rows) else 0


def losses_of(
    rank: int, processes: int, pairs: int, width: int
) -> dict[str, Callable[..., Tensor]]:
    """By name: each way plain, with identities that all differ, with those of a batch in which a
    tenth of the pairs share one, and with label smoothing."""
    distinct = torch.arange(rank * pairs, (rank + 1) * pairs) * 7919
    identities = {"no duplicates": distinct, "smoothed": None}
    repeated = distinct.where(torch.arange(pairs) % 10 > 0, 0)
    losses: dict[str, Callable[..., Tensor]] = {}
    for way, (kind, settings) in WAYS.items():
        losses[way] = kind(**settings)
        for option in OPTIONS[way]:
            smoothing = {"label_smoothing": 0.1} if "smoothed" in option else {}
            loss = kind(**settings, **smoothing)
            losses[f"{way}, {option}"] = partial(loss, identities=identities.get(option, repeated))
    return losses


if __name__ == "__main__":
    sys.exit(main())
