"""`parallel.stash: auto`: the largest stash that fits, against a search by hand."""

import dataclasses

import pytest

from parallel_clip.errors import InputError
from parallel_clip.loss.exchange_plan import peak_loss_bytes, plan_exchange
from parallel_clip.plan import memory as plan_memory
from parallel_clip.plan.memory import (
    RankMemory,
    fit_stash_to_memory,
    peak_activations,
    stage_memory,
)
from tests.plan.plan_jobs import EVEN, PAIRS, small_job

MEBI = 2**20


def holding(state: int, *saved: int) -> RankMemory:
    return RankMemory(0, state, 0, 0, 0, tuple({"layers": size} for size in saved))


def loss_bytes(microbatches: int) -> int:
    sizes = PAIRS * microbatches, EVEN["embed_dim"], 1, 1
    return peak_loss_bytes(plan_exchange("auto", "auto", *sizes), *sizes)


@pytest.fixture
def given(monkeypatch):
    """given([...]): what the ranks hold, in place of the count."""

    def give(held: list[RankMemory]) -> None:
        monkeypatch.setattr(plan_memory, "stage_memory", lambda _, rank: held[rank])

    return give


def with_memory(job, memory: int):
    parallel = job.config.parallel.model_copy(update={"memory": memory})
    return dataclasses.replace(job, config=job.config.model_copy(update={"parallel": parallel}))


@pytest.mark.parametrize("microbatches", [1, 2, 3, 4, 7])
def test_as_many_as_fit_on_every_stage(tmp_path, given, microbatches):
    states, saved = [5 * MEBI, 2 * MEBI, 3 * MEBI], [MEBI, 2 * MEBI, 2 * MEBI]
    given([holding(state, size) for state, size in zip(states, saved, strict=True)])
    job = small_job(tmp_path, microbatches, pipeline=3)

    def fullest(stash: int) -> int:
        loss = [0, 0, loss_bytes(microbatches)]
        graphs = [stash + min(3 - rank, microbatches - stash) for rank in range(3)]
        return max(s + n * a + x for s, n, a, x in zip(states, graphs, saved, loss, strict=True))

    found = []
    for memory in range(fullest(0), fullest(microbatches) + 2 * MEBI, MEBI // 2):
        found.append(fit_stash_to_memory(with_memory(job, memory)).stash)
        assert found[-1] == max(k for k in range(microbatches + 1) if fullest(k) <= memory)
    assert found == sorted(found) and found[-1] == microbatches


def test_a_byte_decides(tmp_path, given):
    given([holding(1000, 10 * MEBI)])
    job = small_job(tmp_path, 4)
    enough = 1000 + 3 * 10 * MEBI + loss_bytes(4)
    assert fit_stash_to_memory(with_memory(job, enough)).stash == 2, (
        "the third is that of the step itself"
    )
    assert fit_stash_to_memory(with_memory(job, enough - 1)).stash == 1


def test_few_microbatches_are_not_kept_where_a_later_stage_has_no_room(tmp_path, given):
    """1F1B has all of them on the first stage, but one alone on the last."""
    given([holding(0, MEBI), holding(0, 10 * MEBI)])
    job = small_job(tmp_path, 2, pipeline=2)
    assert job.stash == 2, "where the memory is not known"
    assert fit_stash_to_memory(with_memory(job, 15 * MEBI)).stash == 0
    assert fit_stash_to_memory(with_memory(job, 21 * MEBI)).stash == 2


def test_with_virtual_stages_what_runs_again_is_whole_groups(tmp_path, given):
    given([holding(0, MEBI, MEBI), holding(0, MEBI, MEBI)])
    job = small_job(tmp_path, 6, pipeline=2, virtual_pipeline=2)
    found = {fit_stash_to_memory(with_memory(job, n * MEBI // 4)).stash for n in range(21, 60)}
    assert found == {0, 2, 4, 6}  # groups of 2, the pipeline's size


def test_too_little_for_two_pass_is_refused_with_the_way_out(tmp_path, given):
    given([holding(10**9, 10**8), holding(3 * 10**9, 10**8)])
    job = small_job(tmp_path, 4, pipeline=2)
    with pytest.raises(InputError) as refusal:
        fit_stash_to_memory(with_memory(job, 2 * 10**9))
    assert str(refusal.value) == (
        "parallel.memory 2000000000 is too little for stage 1, which fills 3.10 GB with nothing "
        "stashed; lower batch.micro 2, set recompute to selective or full, or use more "
        "parallel.tensor or parallel.pipeline ranks"
    )


@pytest.mark.parametrize("parallel", [{}, {"stash": 3}, {"schedule": "stash"}])
def test_without_a_memory_nothing_is_counted_and_nothing_changes(tmp_path, parallel):
    job = small_job(tmp_path, 4, **parallel)
    assert fit_stash_to_memory(job) is job


def test_what_is_counted_is_what_the_stages_hold(tmp_path):
    job = small_job(tmp_path, 6, pipeline=2)
    held = [stage_memory(job, rank) for rank in range(2)]
    full = [h.state + peak_activations(job, rank, 3, h) for rank, h in enumerate(held)]
    memory = max(full[0], full[1] + loss_bytes(6))
    assert fit_stash_to_memory(with_memory(job, memory)).stash == 3
