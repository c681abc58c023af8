"""Jobs on small models for the tests of what stages hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from parallel_clip.config import config_from_dict
from parallel_clip.plan.run_plan import Job, make_run_plan
from tests.small_models import small_model

PAIRS = 2  # in a microbatch
EVEN = small_model({"layers": 6}, {"layers": 6, "vocab_size": 49408})


def small_job(
    folder: Path,
    microbatches: int,
    data: int = 1,
    tensor: int = 1,
    model: dict[str, Any] = EVEN,
    **parallel: Any,
) -> Job:
    """A checked config; `parallel` as in the config file."""
    (folder / "model.json").write_text(json.dumps(model))
    config = config_from_dict(
        {
            "model": {"name": str(folder / "model.json")},
            "batch": {"global": PAIRS * microbatches * data, "micro": PAIRS},
            "parallel": {"tensor": tensor, "distributed_optimizer": False, **parallel},
            "train": {"steps": 1},
            "schedule": {"warmup": 0},
            "data": {"train": [{"shards": "none.tar"}]},
            "run_dir": str(folder / "run"),
        }
    )
    return make_run_plan(config, data * tensor * parallel.get("pipeline", 1))
