"""The peak memory that parallel_clip counts for a step before it runs, to set beside the measured.

Counted by the code behind `--dry-run`: state, saved activations and pictures. Not in it: what a
kernel works in, gradients on their way through a layer, the loss, and the allocator's gaps.
"""

from __future__ import annotations

from collections.abc import Iterable

from gpu_subjects import RECOMPUTE, SCHEDULES, our_name

from parallel_clip.config import config_from_dict
from parallel_clip.model.architecture import Architecture
from parallel_clip.plan.layout_plan import make_layout_plan
from parallel_clip.plan.memory import count_stages
from parallel_clip.plan.stage_estimate import estimate_step

# By model, pairs of a microbatch and subject.
CountedPeaks = dict[tuple[str, int, str], int]


def counted_peaks(
    architectures: Iterable[Architecture], micro: Iterable[int], microbatches: int
) -> CountedPeaks:
    """Bytes at the fullest moment of a step on one GPU in bf16; seconds a model, on fake tensors.

    Raises RuntimeError in a process that has joined a process group.
    """
    counted: CountedPeaks = {}
    micro = list(micro)
    for architecture in architectures:
        for pairs in micro:
            for recompute in RECOMPUTE:
                memory = None  # the same for all schedules
                for schedule in SCHEDULES:
                    tree = {
                        "data": {"train": [{"shards": "unused.tar"}]},
                        "batch": {"global": pairs * microbatches, "micro": pairs},
                        "precision": "bf16",
                        "recompute": recompute,
                        "parallel": {"schedule": schedule},
                        "train": {"steps": 1},
                    }
                    config = config_from_dict(tree)
                    plan = make_layout_plan(architecture.costs, 1, config)
                    memory = memory or count_stages(config, architecture, plan)
                    (stage,) = estimate_step(plan, architecture.costs, memory).stages
                    name = our_name(recompute, schedule)
                    counted[architecture.name, pairs, name] = stage.peak
    return counted
