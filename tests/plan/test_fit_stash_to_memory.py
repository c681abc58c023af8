"""`parallel.stash: auto`: the largest stash that fits, against a search by hand."""

import pytest

from parallel_clip.errors import InputError
from parallel_clip.loss.exchange_plan import peak_loss_bytes, plan_exchange
from parallel_clip.plan import segment_plan
from parallel_clip.plan.memory import (
    RankMemory,
    filled_bytes,
    fit_stash_to_memory,
    peak_memory,
)
from parallel_clip.plan.run_plan import RunPlan
from parallel_clip.plan.segment_plan import PART_OF_FREE_MEMORY
from tests.plan.small_plans import EVEN, PAIRS, small_plan

MEBI = 2**20


def holding(state: int, *saved: int, pictures: int = 0, pictures_ahead: int = 0) -> RankMemory:
    saved = tuple({"layers": size} for size in saved)
    return RankMemory(0, state, 0, 0, 0, saved, pictures, pictures_ahead)


def loss_bytes(microbatches: int) -> int:
    sizes = PAIRS * microbatches, EVEN["embed_dim"], 1, 1
    return peak_loss_bytes(plan_exchange("auto", "auto", *sizes), *sizes)


@pytest.mark.parametrize("microbatches", [1, 2, 3, 4, 7])
def test_as_many_as_fit_on_every_stage(tmp_path, microbatches):
    states, saved = [5 * MEBI, 2 * MEBI, 3 * MEBI], [MEBI, 2 * MEBI, 2 * MEBI]
    held = [holding(state, size) for state, size in zip(states, saved, strict=True)]
    plan = small_plan(tmp_path, microbatches, pipeline=3).layout_plan

    def fullest(stash: int) -> int:
        loss = [0, 0, loss_bytes(microbatches)]
        graphs = [stash + min(3 - rank, microbatches - stash) for rank in range(3)]
        return max(s + n * a + x for s, n, a, x in zip(states, graphs, saved, loss, strict=True))

    found = []
    for limit in range(fullest(0), fullest(microbatches) + 2 * MEBI, MEBI // 2):
        found.append(fit_stash_to_memory(plan, held, limit).stash)
        assert found[-1] == max(k for k in range(microbatches + 1) if fullest(k) <= limit)
    assert found == sorted(found) and found[-1] == microbatches


def test_a_byte_decides(tmp_path):
    held = [holding(1000, 10 * MEBI)]
    plan = small_plan(tmp_path, 4).layout_plan
    enough = 1000 + 3 * 10 * MEBI + loss_bytes(4)
    assert fit_stash_to_memory(plan, held, enough).stash == 2, "the third is the step's own"
    assert fit_stash_to_memory(plan, held, enough - 1).stash == 1


def test_pictures_count_with_each_graph_and_one_microbatch_ahead(tmp_path):
    held = [holding(1000, 10 * MEBI, pictures=2 * MEBI, pictures_ahead=MEBI)]
    plan = small_plan(tmp_path, 4).layout_plan
    enough = 1000 + 3 * 10 * MEBI + 7 * MEBI + loss_bytes(4)
    assert fit_stash_to_memory(plan, held, enough).stash == 2
    assert fit_stash_to_memory(plan, held, enough - 1).stash == 1


def test_few_microbatches_are_not_kept_where_a_later_stage_has_no_room(tmp_path):
    """1F1B has all of them on the first stage, but one alone on the last."""
    held = [holding(0, MEBI), holding(0, 10 * MEBI)]
    plan = small_plan(tmp_path, 2, pipeline=2).layout_plan
    assert plan.stash == 2, "where the memory is not known"
    assert fit_stash_to_memory(plan, held, 15 * MEBI).stash == 0
    assert fit_stash_to_memory(plan, held, 21 * MEBI).stash == 2


def test_with_virtual_stages_what_runs_again_is_whole_groups(tmp_path):
    held = [holding(0, MEBI, MEBI), holding(0, MEBI, MEBI)]
    plan = small_plan(tmp_path, 6, pipeline=2, virtual_pipeline=2).layout_plan
    found = {fit_stash_to_memory(plan, held, n * MEBI // 4).stash for n in range(21, 60)}
    assert found == {0, 2, 4, 6}  # groups of 2, the pipeline's size


def test_too_little_for_two_pass_is_refused_with_the_way_out(tmp_path):
    held = [holding(10**9, 10**8), holding(3 * 10**9, 10**8)]
    plan = small_plan(tmp_path, 4, pipeline=2).layout_plan
    with pytest.raises(InputError) as refusal:
        fit_stash_to_memory(plan, held, 2 * 10**9)
    assert str(refusal.value) == (
        "parallel.memory 2000000000 is too little for stage 1, which fills 3.10 GB with nothing "
        "stashed; lower batch.micro 2, set recompute to selective or full, or use more "
        "parallel.tensor or parallel.pipeline ranks"
    )


@pytest.mark.parametrize(
    ("parallel", "stash"), [({}, 0), ({"stash": 3}, 3), ({"schedule": "stash"}, 4)]
)
def test_without_a_memory_nothing_is_counted_and_nothing_changes(tmp_path, parallel, stash):
    plan = small_plan(tmp_path, 4, **parallel)
    assert plan.memory is None
    assert plan.layout_plan.stash == stash


def test_what_is_counted_is_what_the_stages_hold(tmp_path):
    counted = small_plan(tmp_path, 6, pipeline=2, dry_run=True)
    full = [
        held.state
        + peak_memory(counted.layout_plan, rank, 3, held).activations
        + (0 if rank else held.pictures * 5)  # of 3 stashed, 2 in flight, none ahead: all 6 but one
        for rank, held in enumerate(counted.memory)
    ]
    memory = max(full[0] + counted.memory[0].pictures, full[1] + loss_bytes(6))
    plan = small_plan(tmp_path, 6, pipeline=2, memory=memory)
    assert plan.layout_plan.stash == 3
    assert plan.memory == counted.memory


def test_on_a_gpu_as_many_are_kept_as_fit_four_fifths_of_what_is_free(tmp_path, monkeypatch):
    counted = small_plan(tmp_path, 6, dry_run=True)

    def chosen(free: int, **parallel) -> RunPlan:
        monkeypatch.setattr(segment_plan, "free_memory_bytes", lambda: free)
        return small_plan(tmp_path, 6, **parallel)

    for stash in (0, 3, 6):
        enough = max(filled_bytes(counted.layout_plan, counted.memory, stash))
        plan = chosen(int(enough / PART_OF_FREE_MEMORY) + 2)
        assert plan.layout_plan.stash == stash
        assert plan.memory == counted.memory
        assert any("free on the GPU" in note for note in plan.notes)
    assert chosen(1000).layout_plan.stash == 0, "it is not known better: two-pass may still fit"
    assert chosen(10**12, memory=enough).layout_plan.stash == 6, "what is asked for is done"
    for settings in ({"stash": 2}, {"schedule": "two-pass"}, {"schedule": "stash"}):
        assert chosen(10**12, **settings).memory is None, "nothing to decide, so nothing counted"
