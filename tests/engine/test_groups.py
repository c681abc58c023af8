import pytest

from parallel_clip.layout import Layout
from tests.engine import group_cases


@pytest.mark.parametrize("layout", [Layout(1), Layout(2), Layout(4, tensor=2), Layout(4, tensor=4)])
def test_groups_are_the_layouts(processes, layout):
    answers = processes.run(layout, group_cases.place)
    for rank, answer in enumerate(answers):
        mine = layout.coordinates(rank)
        assert answer["rank"] == rank
        assert answer["coordinates"] == mine
        others = [(r, layout.coordinates(r)) for r in range(layout.world)]
        assert answer["sums"] == {
            "world": sum(range(layout.world)),
            "tensor": sum(r for r, c in others if c.data == mine.data),
            "data": sum(r for r, c in others if c.tensor == mine.tensor),
            "pipeline": rank,
        }


def test_one_ranks_complaint_is_everyones(processes):
    answers = processes.run(Layout(3), group_cases.complain_everywhere, wrong=[1])
    assert answers == ["InputError: rank 1 found it"] * 3


def test_without_a_complaint_each_rank_has_its_own_result(processes):
    answers = processes.run(Layout(3), group_cases.complain_everywhere, wrong=[])
    assert answers == [f"rank {rank} is content" for rank in range(3)]


def test_rank_zero_speaks_for_all(processes):
    assert (
        processes.run(Layout(2), group_cases.ask_rank_zero, wrong=False) == ["said by rank 0"] * 2
    )
    assert (
        processes.run(Layout(2), group_cases.ask_rank_zero, wrong=True)
        == ["InputError: found by rank 0"] * 2
    )
