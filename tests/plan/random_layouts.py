"""Layouts of full-size models at random, to hold counts of memory against each other."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from parallel_clip.config import Config, config_from_dict
from parallel_clip.model.architecture import Architecture
from parallel_clip.model.known_models import load_architecture
from parallel_clip.plan.build import frozen_parts
from parallel_clip.plan.layout_plan import DoesNotFit, LayoutPlan, try_layout_plan

# OpenCLIP's own; SigLIP 2, whose vocabulary has 256,000 words; PE-Core with rotary positions;
# MetaCLIP worldwide with 901,629 words; CLIPA, whose texts are short.
MODELS = (
    "ViT-L-14",
    "ViT-SO400M-14-SigLIP2",
    "PE-Core-B-16",
    "ViT-H-14-worldwide",
    "ViT-L-14-CLIPA",
)


class RandomLayout(NamedTuple):
    config: Config
    architecture: Architecture
    plan: LayoutPlan

    def __str__(self) -> str:
        plan, config = self.plan, self.config
        extras = {"freeze": config.freeze, "captions": plan.batch.captions, "ema": config.ema.decay}
        return (
            f"{self.architecture.name} {plan.layout} micro {plan.batch.micro_batch} of "
            f"{plan.batch.microbatches} stash {plan.stash} {config.recompute} {config.precision} "
            f"{config.loss.kind} {extras}"
        )


def random_layouts(seed: int, count: int) -> Iterator[RandomLayout]:
    """Such as `train` accepts, each model in turn, on up to 1,024 ranks."""
    chance, number = random.Random(seed), 0
    while number < count:
        architecture = load_architecture(MODELS[number % len(MODELS)])
        config, world, stash = _random_config(chance, architecture.name)
        costs = frozen_parts(architecture, config.freeze).costs_of(architecture)
        plan = try_layout_plan(costs, world, config)
        if not isinstance(plan, DoesNotFit):
            number += 1
            yield RandomLayout(config, architecture, replace(plan, stash=stash))


def _random_config(chance: random.Random, model: str) -> tuple[Config, int, int]:
    tensor, pipeline = chance.choice([1, 2, 4, 8]), chance.choice([1, 1, 2, 3, 4])
    virtual = chance.choice([1, 1, 2]) if pipeline > 1 else 1
    data = chance.choice([1, 2, 8, 32])
    micro, count = (
        chance.choice([1, 4, 16, 64]),
        chance.choice([1, 2, 3, 4, 6]),
    )
    if virtual > 1:
        count *= pipeline
    freeze = chance.choice(
        [{}] * 3 + [{"text": "all"}, {"vision": {"unlocked_groups": 6, "norms": True}}]
    )
    config = config_from_dict(
        {
            "model": {"name": model},
            "train": {"steps": 1},
            "data": {
                "train": [{"shards": "none.tar", "caption_lines": True}],
                "captions_per_image": chance.choice([1, 1, 1, 2]),
            },
            "batch": {"global": micro * count * data, "micro": micro},
            "precision": chance.choice(["bf16", "bf16", "fp32"]),
            "recompute": chance.choice(["none", "selective", "full"]),
            "loss": {"kind": chance.choice(["infonce", "sigmoid"])},
            "freeze": freeze,
            "ema": chance.choice([{}, {}, {"decay": 0.99}]),
            "parallel": {
                "tensor": tensor,
                "sequence": tensor > 1 and chance.random() < 0.7,
                "pipeline": pipeline,
                "virtual_pipeline": virtual,
                "pad": True,
                "distributed_optimizer": chance.random() < 0.7,
            },
        }
    )
    stash = chance.choice([0, 0, count, count // 2 if virtual == 1 else 0])
    return config, tensor * pipeline * data, stash
