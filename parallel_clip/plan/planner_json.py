"""The answer of `parallel-clip plan` as JSON, for other programs."""

from __future__ import annotations

from typing import Any

from parallel_clip.config import Config
from parallel_clip.plan.planner import Answer
from parallel_clip.plan.rank_bytes import RankBytes
from parallel_clip.plan.search import PlannedLayout


def answer_tree(answer: Answer) -> dict[str, Any]:
    """`{"layouts": [...], "refused": [...]}`, the quickest first, and what was asked.
    counted_bytes: of tensors at the fullest moment of the first one's step, by --count."""
    gpus = answer.question.gpus
    return {
        "model": answer.architecture.name,
        "gpus": gpus,
        "gpu": answer.device.name,
        "gpu_memory_bytes": answer.limit,
        "batch": answer.question.config.batch.global_,
        "counted_bytes": None if answer.counted is None else answer.counted.total,
        "layouts": [_layout_tree(answer, found) for found in answer.result.layouts],
        "refused": [
            {
                **_settings(refused.config, gpus),
                "reason": refused.reason,
                "needs_bytes": refused.needs_bytes,
            }
            for refused in answer.result.refused
        ],
    }


def _layout_tree(answer: Answer, found: PlannedLayout) -> dict[str, Any]:
    time, plan = found.time, found.plan
    return {
        **_settings(found.config, answer.question.gpus),
        "stash": plan.stash,
        "exchange": "gather" if plan.exchange.gathered else "ring",
        **_memory_tree(found.memory),
        "fullest_stage": found.stage,
        "step_seconds": time.seconds,
        "samples_per_second": time.samples_per_second,
        "mfu": time.mfu,
        "bubble": time.bubble,
        "compute_seconds": time.compute,
        "communication_seconds": time.communication,
        "optimizer_seconds": time.optimizer,
        "loss_seconds": time.loss,
        "days": answer.days(found),
    }


def _settings(config: Config, gpus: int) -> dict[str, Any]:
    parallel = config.parallel
    ranks = parallel.tensor * parallel.pipeline
    return {
        "tensor": parallel.tensor,
        "pipeline": parallel.pipeline,
        "virtual_pipeline": parallel.virtual_pipeline,
        "data": gpus // ranks,
        "sequence": parallel.sequence,
        "pad": parallel.pad,
        "micro": config.batch.micro,
        "schedule": parallel.schedule,
        "stash": None if parallel.stash == "auto" else parallel.stash,
        "recompute": config.recompute,
        "distributed_optimizer": parallel.distributed_optimizer,
        "exchange": None,
    }


def _memory_tree(memory: RankBytes) -> dict[str, Any]:
    kinds = ("weights", "gradients", "optimizer", "activations", "loss", "other", "total")
    of_other = ("inputs", "work", "buffers", "process", "slack")
    return {
        "memory_bytes": {kind: getattr(memory, kind) for kind in kinds},
        "other_bytes": {kind: getattr(memory, kind) for kind in of_other},
    }
