import pytest
import torch

from parallel_clip.errors import InputError
from parallel_clip.evaluate.interrupt import EvaluationInterrupted, InterruptibleBatches
from tests.evaluate.world import on_ranks

BATCHES = (0, 3, 5)  # of each rank


def seen_on(group, ahead, asked_rank=None, bad_rank=None):
    """The batches that a rank has seen, and the error that ended them."""
    rank, seen = group.rank(), []

    def batches():
        for number in range(BATCHES[rank]):
            if rank == bad_rank and number == 1:
                raise InputError("bad")
            yield number

    iterate = InterruptibleBatches(
        group, torch.device("cpu"), lambda: rank == asked_rank and len(seen) == 2, ahead=ahead
    )
    try:
        for batch in iterate(batches()):
            seen.append(batch)
    except (InputError, EvaluationInterrupted) as error:
        return seen, type(error)
    return seen, None


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_each_rank_sees_its_own_batches(tmp_path, ahead):
    found = on_ranks(3, seen_on, tmp_path, ahead)
    assert found == [(list(range(count)), None) for count in BATCHES]


@pytest.mark.parametrize("ahead", [0, 1, 3])
@pytest.mark.parametrize("asked_rank", [1, 2])
def test_all_leave_after_the_same_question(tmp_path, ahead, asked_rank):
    found = on_ranks(3, seen_on, tmp_path, ahead, asked_rank)
    asked_at = 3  # the question beside the third batch
    last = [min(count, asked_at + ahead) for count in BATCHES]
    assert found == [(list(range(count)), EvaluationInterrupted) for count in last]


@pytest.mark.parametrize("ahead", [0, 2])
def test_bad_input_on_one_rank_keeps_no_other_waiting(tmp_path, ahead):
    found = on_ranks(3, seen_on, tmp_path, ahead, None, 1)
    assert found == [([], None), ([0], InputError), ([0, 1, 2, 3, 4], None)]
