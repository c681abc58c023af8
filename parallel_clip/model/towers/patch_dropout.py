"""Patch dropout: which patches of a picture a training step keeps.

Li et al., "Scaling Language-Image Pre-training via Masking" (arXiv 2212.00794).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor


def kept_patches(seed: int, step: int, position: int, patches: int, keep: int) -> np.ndarray:
    """Indices of the `keep` of `patches` patches that a sample keeps, sorted: int64 [keep].

    A pure function, so that every tensor rank and both passes of a two-pass step keep the same
    patches, and so that a reference can be fed them.

    Args:
        seed: the run's seed.
        step: the optimizer step. A position of the global order belongs to exactly one step, so
            it adds nothing to the draw: any value gives the same patches.
        position: the sample's place in the global order, counted from 0 over all epochs.
        patches: patches of the whole picture; the class token is not one and always stays.
        keep: how many stay: `VisionConfig.patches_kept`.
    """
    del step
    generator = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 1, position]))
    return np.sort(generator.permutation(patches)[:keep])


def kept_patches_of_batch(
    seed: int, step: int, positions: Sequence[int], patches: int, keep: int
) -> np.ndarray:
    """`kept_patches` of each position: int64 [len(positions), keep]."""
    rows = [kept_patches(seed, step, int(position), patches, keep) for position in positions]
    return np.stack(rows)


def keep_tokens(x_sbh: Tensor, tokens_bk: Tensor) -> Tensor:
    """[s, b, h] -> [k, b, h]: of each picture the tokens that are named."""
    return x_sbh.gather(0, tokens_bk.t().unsqueeze(-1).expand(-1, -1, x_sbh.shape[-1]))
