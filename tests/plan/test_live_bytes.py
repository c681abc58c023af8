import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from parallel_clip.engine.fake_world import fake_rank
from parallel_clip.layout import Layout
from parallel_clip.plan.live_bytes import LiveBytes

KIB = 1024


def test_each_piece_counts_once_from_when_it_is_made_until_it_is_freed():
    before = torch.zeros(KIB, dtype=torch.uint8)
    with LiveBytes() as live:
        first = torch.zeros(KIB, dtype=torch.uint8)
        view = first.view(2, -1)[1:]
        assert (live.now, live.peak) == (KIB, KIB)
        second = first + before
        assert (live.now, live.peak) == (2 * KIB, 2 * KIB)
        del first
        assert live.now == 2 * KIB, "a view keeps all of it"
        del view, second
        assert (live.now, live.peak) == (0, 2 * KIB)


def test_what_is_freed_before_it_is_computed_again():
    with fake_rank(Layout(1)), LiveBytes() as live:
        tensor, source = torch.zeros(KIB), torch.zeros(KIB)
        tensor.untyped_storage().resize_(0)
        assert live.now == 4 * KIB
        tensor.untyped_storage().resize_(4 * KIB)
        tensor.untyped_storage().copy_(source.untyped_storage())
        assert live.now == 8 * KIB
        del tensor, source
        assert (live.now, live.peak) == (0, 8 * KIB)


@pytest.mark.parametrize("fake", [False, True])
def test_a_backward_pass(fake):
    """x² twice: x and its square are kept, and the gradient of each comes and goes."""
    mode = FakeTensorMode() if fake else torch.enable_grad()
    with mode, LiveBytes() as live:
        x = torch.ones(KIB, requires_grad=True)
        y = x.square().square().sum()
        assert live.now == 2 * 4 * KIB + 4
        peaks = {}
        with live.peak_of(peaks, "backward"):
            y.backward()
        del y
        assert live.now == 2 * 4 * KIB, "x and its gradient"
        assert 4 * 4 * KIB <= peaks["backward"] <= 5 * 4 * KIB + 16


def test_the_peak_of_a_part_is_its_own():
    with LiveBytes() as live:
        peaks = {}
        with live.peak_of(peaks, "large"):
            torch.zeros(KIB)
        with live.peak_of(peaks, "small"):
            torch.zeros(1)
        assert peaks == {"large": 4 * KIB, "small": 4}
        assert live.peak == 4 * KIB
