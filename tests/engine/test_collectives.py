import torch

from parallel_clip.engine.collectives import gather_rows, raise_on_all_ranks
from parallel_clip.errors import InputError
from tests.evaluate.world import on_ranks


def test_alone():
    rows = torch.arange(6).view(3, 2)
    assert gather_rows(rows, None) is rows
    with raise_on_all_ranks(None):
        pass


def gather_uneven(group, counts):
    mine = torch.full((counts[group.rank()], 2), float(group.rank()))
    return gather_rows(mine, group)


def test_uneven_and_empty_parts(tmp_path):
    for rows in on_ranks(3, gather_uneven, tmp_path, [2, 0, 3]):
        assert rows.tolist() == [[0, 0]] * 2 + [[2, 2]] * 3


def fail_on(group, wrong):
    with raise_on_all_ranks(group):
        if group.rank() in wrong:
            raise InputError(f"rank {group.rank()} found it")
    return "went on"


def test_an_error_of_one_rank_is_that_of_all(tmp_path):
    for error in on_ranks(3, fail_on, tmp_path, [2, 1]):
        assert isinstance(error, InputError) and str(error) == "rank 1 found it"


def test_without_an_error_all_go_on(tmp_path):
    assert on_ranks(2, fail_on, tmp_path, []) == ["went on"] * 2
