"""The plan of a run is data, found once: it travels between processes and decides everything."""

import pickle

from parallel_clip.plan.run_plan import make_run_plan
from tests.plan.small_plans import small_config, small_plan


def test_a_plan_travels_between_processes(tmp_path):
    plan = small_plan(tmp_path, 4, pipeline=2, memory="2GB")
    assert pickle.loads(pickle.dumps(plan)) == plan


def test_a_memory_limit_decides_the_stash_of_the_plan(tmp_path):
    """Whoever trains from Python with a plan gets what the command gets."""
    assert small_plan(tmp_path, 4).layout_plan.stash == 0, "4 microbatches on one stage"
    limit = small_plan(tmp_path, 4, schedule="stash").prediction.memory.total
    plan, shards = make_run_plan(small_config(tmp_path, 4, memory=limit), 1)
    assert plan.layout_plan.stash == 4
    assert [table.samples for table in shards.train] == [2]


def test_a_plan_says_what_it_trains_on(tmp_path):
    plan = small_plan(tmp_path, 4)
    assert (plan.steps, plan.blends[0].pairs, plan.is_finished) == (1, (2,), False)
    assert plan.data_fingerprint["sources"][0]["samples"] == 2
    assert plan.tokenizer.build(plan.architecture.text).path is None and plan.tokenizer_name is None
    assert not (tmp_path / "run").exists() and not list(tmp_path.rglob("shards.index"))
