"""Runs the real training step of cases on fake CUDA tensors, and prints a line of JSON of each.

    python -m tests.fake_cuda.steps NAME...

In an environment in which torch finds the stubs (build.py).
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from megatron.core import __version__ as megatron_version

from parallel_clip.config import Config
from parallel_clip.data.feeding.training_data import Microbatch
from parallel_clip.data.samples.transforms import Preprocess
from parallel_clip.engine.fake_world import fake_rank
from parallel_clip.engine.groups import Groups
from parallel_clip.layout import Layout
from parallel_clip.model.architecture import Architecture
from parallel_clip.model.megatron_config import DTYPES
from parallel_clip.model.openclip_json import architecture_from_json
from parallel_clip.pipeline.inputs import Pictures, StepInputs
from parallel_clip.plan.build import build_loss, build_planned_state
from parallel_clip.plan.layout_plan import LayoutPlan, make_layout_plan
from parallel_clip.training.feed import DeviceFeed
from parallel_clip.training.step import TrainStep
from tests.fake_cuda.cases import CASES, LAYER_CASES, Case
from tests.fake_cuda.probes import unexpected
from tests.fake_cuda.watch import Counts, Watch
from tests.ranks import config_of
from tests.small_models import small_model

PAIRS = 8  # in a microbatch
LAYERS = 2  # of each tower: enough for two virtual stages on each of two ranks


def second_step(case: Case, layers: int = LAYERS) -> Watch:
    """What the second step of a case does: the first makes Adam's moments. layers: of the picture
    tower."""
    layout = Layout(case.world, case.tensor, case.pipeline, case.virtual, case.sequence)
    batch = {"global": PAIRS * case.microbatches * layout.data, "micro": PAIRS}
    config = config_of(layout, batch=batch, **case.settings)
    siglip = {"init_logit_bias": -10} if config.loss.kind == "sigmoid" else {}
    model = small_model({"layers": layers} | case.vision, {"layers": LAYERS}, **siglip)
    architecture = architecture_from_json(model, "small")
    plan = make_layout_plan(architecture.costs, case.world, config)
    with_identities = config.loss.duplicates != "none"
    read, captions = [], plan.batch.captions
    if case.fed:
        read = read_microbatches(architecture, case.microbatches, with_identities, captions)
    with fake_rank(layout, case.rank) as groups:
        step = TrainStep(
            build_planned_state(config, architecture, plan, groups),
            build_loss(plan, groups),
            plan.stash,
            groups.pipeline,
            plan.loss_on_all_stages,
            world=groups.world,
        )
        inputs = fed_inputs if case.fed else ready_inputs
        steps = inputs(config, architecture, plan, groups, read)
        watch = Watch()
        for _ in range(2):
            watch.step, watch.feed = Counts(), Counts()
            with watch:
                step(next(steps), 1e-3, lambda: [0, 5, 1])
    return watch


def ready_inputs(
    config: Config, architecture: Architecture, plan: LayoutPlan, groups: Groups, _: Any
) -> Iterator[StepInputs]:
    """Inputs that are on the device from the start."""
    vision, text = architecture.vision, architecture.text
    options = {"device": groups.device}
    images = torch.empty(PAIRS, 3, *vision.image_size, dtype=DTYPES[config.precision], **options)
    kept = None
    if vision.patches_kept < vision.patches:
        kept = torch.empty(PAIRS, vision.patches_kept, dtype=torch.int64, **options)
    tokens = torch.empty(PAIRS, text.context_length, dtype=torch.int64, **options)
    while True:
        yield StepInputs([tokens] * plan.batch.microbatches, lambda _: Pictures(images, kept))


def fed_inputs(
    config: Config,
    architecture: Architecture,
    plan: LayoutPlan,
    groups: Groups,
    read: list[Microbatch],
) -> Iterator[StepInputs]:
    """Inputs as the trainer's feed makes them of what a loader gives."""
    loader = [read, read] if groups.reads_data else None
    dtype = DTYPES[config.precision]
    preprocess = Preprocess(architecture.vision.image_size)
    with_identities = config.loss.duplicates != "none"
    feed = DeviceFeed(
        loader, architecture, plan.batch, groups, dtype, config.seed, preprocess, with_identities
    )
    return (batch.inputs for batch in feed.batches(0, 2))


def read_microbatches(
    architecture: Architecture, count: int, with_identities: bool, captions: int
) -> list[Microbatch]:
    """Real tensors in page-locked memory, as from a loader; made outside of a fake world."""
    size, context = architecture.vision.image_size, architecture.text.context_length
    texts = PAIRS * captions
    return [
        Microbatch(
            torch.zeros(PAIRS, 3, *size, dtype=torch.uint8),
            torch.zeros(texts, context, dtype=torch.int64),
            torch.arange(number * PAIRS, (number + 1) * PAIRS),
            addresses=[],
            bad=[],
            identities=torch.zeros(texts, dtype=torch.int64) if with_identities else None,
        ).pin_memory()
        for number in range(count)
    ]


def kernels_of_a_layer(case: Case) -> Counter[str]:
    """Kernels of one layer of the picture tower, by part of a step of one microbatch."""
    case = replace(case, microbatches=1)
    fewer, more = (second_step(case, layers).step.kernels for layers in (1, 2))
    more.subtract(fewer)
    return more


if __name__ == "__main__":
    assert torch.cuda.is_available(), "to be run with the stubs, see build.py"
    # Device threads of autograd would leave the modes that watch and make fakes behind.
    torch.autograd.set_multithreading_enabled(False)
    print(json.dumps({"case": "probes", "unexpected": list(unexpected())}), flush=True)
    for name in sys.argv[1:]:
        watch = second_step(CASES[name])
        layer = kernels_of_a_layer(CASES[name]) if name in LAYER_CASES else {}
        counts = {"step": vars(watch.step), "feed": vars(watch.feed), "layer": layer}
        print(json.dumps({"case": name, "megatron": megatron_version, **counts}), flush=True)
