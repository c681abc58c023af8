"""Plans of runs of small models for the tests of what stages hold."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from parallel_clip.config import Config, config_from_dict
from parallel_clip.model.openclip_json import architecture_from_json
from parallel_clip.plan.layout_plan import LayoutPlan
from parallel_clip.plan.memory import RankMemory
from parallel_clip.plan.rank_bytes import StepMemory
from parallel_clip.plan.rank_process import RankProcess
from parallel_clip.plan.run_plan import RunPlan, make_run_plan
from tests.data.shard_files import write_shards
from tests.small_models import small_model

PAIRS = 2  # in a microbatch
EVEN = small_model({"layers": 6}, {"layers": 6, "vocab_size": 49408})


def small_config(
    folder: Path,
    microbatches: int,
    data: int = 1,
    tensor: int = 1,
    model: dict[str, Any] = EVEN,
    **parallel: Any,
) -> Config:
    """A config whose model and shards lie in `folder`; `parallel` as in the config file."""
    (folder / "model.json").write_text(json.dumps(model))
    if not (folder / "shards").exists():
        write_shards(folder / "shards", [2])
    return config_from_dict(
        {
            "model": {"name": str(folder / "model.json")},
            "batch": {"global": PAIRS * microbatches * data, "micro": PAIRS},
            "parallel": {"tensor": tensor, "distributed_optimizer": False, **parallel},
            "train": {"steps": 1},
            "schedule": {"warmup": 0},
            "data": {"train": [{"shards": str(folder / "shards")}], "workers": 0},
            "run_dir": str(folder / "run"),
        }
    )


def small_plan(folder: Path, microbatches: int, dry_run: bool = False, **settings: Any) -> RunPlan:
    """The plan of a run of `small_config`; with `dry_run` the memory of its stages is counted."""
    config = small_config(folder, microbatches, **settings)
    parallel = config.parallel
    world = settings.get("data", 1) * parallel.tensor * parallel.pipeline
    plan, _ = make_run_plan(config, world, dry_run=dry_run)
    return plan


class NothingBeside:
    """In place of FastMemory: nothing comes and goes beside what stages hold."""

    architecture = architecture_from_json(EVEN, "small")

    def __getattr__(self, name: str) -> Callable[..., int]:
        return lambda *_: 0

    def transient_bytes(self, plan: LayoutPlan, *_) -> list[int]:
        return [0] * plan.layout.virtual_pipeline


def step_holding(plan: LayoutPlan, held: Sequence[RankMemory]) -> StepMemory:
    """Of stages that hold just this."""
    return StepMemory(plan, held, NothingBeside(), "none", RankProcess(base=0, slack=0))
