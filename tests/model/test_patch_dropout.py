import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from parallel_clip.model import kept_patches
from parallel_clip.model.towers.patch_dropout import kept_patches_of_batch


@given(
    seed=st.integers(0, 2**32),
    step=st.integers(1, 10**6),
    position=st.integers(0, 2**40),
    patches=st.integers(1, 400),
    data=st.data(),
)
def test_sorted_unique_and_pure(seed, step, position, patches, data):
    keep = data.draw(st.integers(1, patches))
    kept = kept_patches(seed, step, position, patches, keep)
    assert kept.dtype == np.int64 and kept.shape == (keep,)
    assert 0 <= kept[0] and kept[-1] < patches
    assert np.all(np.diff(kept) > 0)
    np.random.default_rng().random()  # nobody else's randomness takes part
    assert np.array_equal(kept, kept_patches(seed, step, position, patches, keep))


def test_seeds_and_positions_draw_differently():
    draws = {
        tuple(kept_patches(seed, 1, position, 49, 25))
        for seed in range(20)
        for position in range(20)
    }
    assert len(draws) == 400


def test_every_patch_and_every_pair_is_kept_equally_often():
    patches, keep, draws = 16, 8, 4000
    kept = np.zeros((draws, patches))
    for position in range(draws):
        kept[position, kept_patches(7, 1, position, patches, keep)] = 1
    together = kept.T @ kept / draws
    single = keep / patches
    pair = single * (keep - 1) / (patches - 1)
    standard_error = 0.5 / draws**0.5
    assert np.abs(np.diag(together) - single).max() < 4.5 * standard_error
    off_diagonal = together[~np.eye(patches, dtype=bool)]
    assert np.abs(off_diagonal - pair).max() < 5 * standard_error


def test_a_batch_is_its_samples():
    rows = kept_patches_of_batch(3, 5, [9, 2, 40], 30, 11)
    assert rows.shape == (3, 11)
    for row, position in zip(rows, [9, 2, 40], strict=True):
        assert np.array_equal(row, kept_patches(3, 5, position, 30, 11))
