"""`parallel.stash: auto`: the largest stash that fits, against a search by hand."""

import pytest

from parallel_clip.engine.host_memory import HostMemory
from parallel_clip.errors import InputError
from parallel_clip.loss.exchange_plan import peak_loss_bytes, plan_exchange
from parallel_clip.plan import memory_limit
from parallel_clip.plan.layout_plan import LayoutPlan
from parallel_clip.plan.memory import RankMemory
from parallel_clip.plan.memory_limit import PART_TO_FILL
from parallel_clip.plan.run_plan import RunPlan
from tests.plan.small_plans import EVEN, PAIRS, small_plan, step_holding

MEBI = 2**20


def holding(state: int, *saved: int, pictures: int = 0, pictures_ahead: int = 0) -> RankMemory:
    saved = tuple({"layers": size} for size in saved)
    return RankMemory(0, state, 0, 0, 0, saved, pictures, pictures_ahead)


def fitting(plan: LayoutPlan, held: list[RankMemory], limit: int) -> int | None:
    """The largest stash, where nothing is estimated beside what is held."""
    return step_holding(plan, held).largest_stash(limit)


def loss_bytes(microbatches: int) -> int:
    sizes = PAIRS * microbatches, EVEN["embed_dim"], 1, 1
    return peak_loss_bytes(plan_exchange("auto", "auto", *sizes), *sizes)


@pytest.mark.parametrize("microbatches", [1, 2, 3, 4, 7])
def test_as_many_as_fit_on_every_stage(tmp_path, microbatches):
    states, saved = [5 * MEBI, 2 * MEBI, 3 * MEBI], [MEBI, 2 * MEBI, 2 * MEBI]
    held = [holding(state, size) for state, size in zip(states, saved, strict=True)]
    plan = small_plan(tmp_path, microbatches, pipeline=3).layout_plan

    def fullest(stash: int) -> int:
        graphs = [stash + min(3 - rank, microbatches - stash) for rank in range(3)]
        in_loss = states[2] + stash * saved[2] + loss_bytes(microbatches)
        return max(in_loss, *(s + n * a for s, n, a in zip(states, graphs, saved, strict=True)))

    found = []
    for limit in range(fullest(0), fullest(microbatches) + 2 * MEBI, MEBI // 2):
        found.append(fitting(plan, held, limit))
        assert found[-1] == max(k for k in range(microbatches + 1) if fullest(k) <= limit)
    assert found == sorted(found) and found[-1] == microbatches


def test_a_byte_decides(tmp_path):
    held = [holding(1000, 10 * MEBI)]
    plan = small_plan(tmp_path, 4).layout_plan
    enough = 1000 + 3 * 10 * MEBI
    assert fitting(plan, held, enough) == 2, "the third is the step's own"
    assert fitting(plan, held, enough - 1) == 1


def test_pictures_count_with_each_graph_and_one_microbatch_ahead(tmp_path):
    held = [holding(1000, 10 * MEBI, pictures=2 * MEBI, pictures_ahead=MEBI)]
    plan = small_plan(tmp_path, 4).layout_plan
    enough = 1000 + 3 * 10 * MEBI + 7 * MEBI
    assert fitting(plan, held, enough) == 2
    assert fitting(plan, held, enough - 1) == 1


def test_few_microbatches_are_not_kept_where_a_later_stage_has_no_room(tmp_path):
    """1F1B has all of them on the first stage, but one alone on the last."""
    held = [holding(0, MEBI), holding(0, 10 * MEBI)]
    plan = small_plan(tmp_path, 2, pipeline=2).layout_plan
    assert plan.stash == 2, "where the memory is not known"
    assert fitting(plan, held, 15 * MEBI) == 0
    assert fitting(plan, held, 21 * MEBI) == 2


def test_with_virtual_stages_what_runs_again_is_whole_groups(tmp_path):
    held = [holding(0, MEBI, MEBI), holding(0, MEBI, MEBI)]
    plan = small_plan(tmp_path, 6, pipeline=2, virtual_pipeline=2).layout_plan
    found = {fitting(plan, held, n * MEBI // 4) for n in range(21, 60)}
    assert found == {0, 2, 4, 6}  # groups of 2, the pipeline's size


def test_too_little_for_two_pass_is_told_apart(tmp_path):
    held = [holding(10**9, 10**8), holding(3 * 10**9, 10**8)]
    plan = small_plan(tmp_path, 4, pipeline=2).layout_plan
    assert fitting(plan, held, 2 * 10**9) is None


@pytest.mark.parametrize(
    ("parallel", "stash"), [({}, 0), ({"stash": 3}, 3), ({"schedule": "stash"}, 4)]
)
def test_a_cpus_memory_changes_no_stash(tmp_path, monkeypatch, parallel, stash):
    """Runs on a CPU give the same bits whatever else fills the machine."""
    monkeypatch.setattr(memory_limit, "host_memory", lambda *_: HostMemory(10**13, 0, "a test"))
    assert small_plan(tmp_path, 4, **parallel).layout_plan.stash == stash


@pytest.mark.parametrize("pipeline", [1, 2])
def test_what_is_told_is_filled(tmp_path, pipeline):
    of_stash = {
        stash: small_plan(tmp_path, 6, pipeline=pipeline, stash=stash).prediction.memory.total
        for stash in (0, 3, 6)
    }
    for stash, size in of_stash.items():
        plan = small_plan(tmp_path, 6, pipeline=pipeline, memory=size)
        # In a pipeline the last microbatch in flight takes as much as its graph that is kept.
        assert plan.layout_plan.stash >= stash and plan.prediction.memory.total == size
    with pytest.raises(InputError, match=f"a rank has .*, parallel.memory {of_stash[0] - 1}"):
        small_plan(tmp_path, 6, pipeline=pipeline, memory=of_stash[0] - 1)


def test_a_dry_run_counts_whole_stages_and_predicts_the_same(tmp_path):
    plan = small_plan(tmp_path, 6, pipeline=2, memory="2GB")
    counted = small_plan(tmp_path, 6, pipeline=2, memory="2GB", dry_run=True)
    assert counted.prediction == plan.prediction
    assert [held.state for held in counted.memory] == [held.state for held in plan.memory]


def test_a_memory_may_be_told_with_any_schedule(tmp_path):
    for schedule, stash in (("two-pass", 0), ("stash", 6)):
        plan = small_plan(tmp_path, 6, schedule=schedule, memory="2GB")
        assert plan.layout_plan.stash == stash


def test_on_a_gpu_as_many_are_kept_as_fit_nine_tenths_of_what_is_free(tmp_path, monkeypatch):
    monkeypatch.setattr(memory_limit, "has_cuda", lambda: True)

    def chosen(free: int, **parallel) -> RunPlan:
        monkeypatch.setattr(memory_limit, "gpu_memory", lambda: (free, 2 * free))
        return small_plan(tmp_path, 6, **parallel)

    of_stash = {n: chosen(10**12, stash=n).prediction.memory.total for n in (0, 3, 6)}
    for stash in (0, 3, 6):
        plan = chosen(int(of_stash[stash] / PART_TO_FILL) + 2)
        assert plan.layout_plan.stash == stash
        assert any("on the GPU of rank 0" in note for note in plan.notes)
    # A tenth is kept free of graphs, and yet used where less does not do.
    assert chosen(of_stash[0] + 1).layout_plan.stash == 0
    assert chosen(10**12, memory=of_stash[6]).layout_plan.stash == 6, "what is asked for is done"
    with pytest.raises(InputError, match="needs more memory than there is"):
        chosen(of_stash[0] - 1)
