"""What benchmarks/gpu.py times: a step of OpenCLIP's trainer and of ours, each with its switches.

All subjects of a case start from the same weights and train on the same pairs. A step is forward,
loss, backward, AdamW and the clamp of logit_scale; ours also takes the gradient's norm. Both read
the loss once.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import open_clip
import torch
from step_time import BETAS, EPS, LR, WEIGHT_DECAY, open_clip_groups, random_batch
from torch import Tensor

from parallel_clip.config import Optimizer
from parallel_clip.data.feeding.training_data import Microbatch
from parallel_clip.data.samples.transforms import Preprocess
from parallel_clip.engine.groups import Groups
from parallel_clip.layout import plan_batch
from parallel_clip.loss import ClipLoss
from parallel_clip.model.architecture import Architecture
from parallel_clip.model.megatron_config import ModelOptions
from parallel_clip.optimizer.train_state import build_train_state
from parallel_clip.pipeline.inputs import Pictures, StepInputs
from parallel_clip.stages.partition import partition
from parallel_clip.training.feed import DeviceFeed
from parallel_clip.training.step import TrainStep

Step = Callable[[], float]  # runs one step and returns its loss

RECOMPUTE = ("none", "selective", "full")
SCHEDULES = ("stash", "two-pass")
LOSS_TILE = 128  # columns of logits in the variant whose loss works in tiles


@dataclass(frozen=True)
class Case:
    """A model and a batch of `microbatches` x `micro` pairs on one device.

    images: fp32 [b, 3, height, width] and texts: int64 [b, context], on the device; weights: of
    OpenCLIP's model, fp32, on the CPU.
    """

    architecture: Architecture
    micro: int
    microbatches: int
    groups: Groups
    deterministic: bool = False
    images: Tensor = field(init=False, repr=False)
    texts: Tensor = field(init=False, repr=False)
    weights: dict[str, Tensor] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        images, texts = random_batch(self.architecture, self.pairs, self.groups.device)
        torch.manual_seed(0)
        with self.groups.device:  # minutes for a large model on the CPU
            model = open_clip.CLIP(**self.architecture.json)
        weights = {name: value.cpu() for name, value in model.state_dict().items()}
        for name, value in (("images", images), ("texts", texts), ("weights", weights)):
            object.__setattr__(self, name, value)

    @property
    def pairs(self) -> int:
        return self.micro * self.microbatches


class Subject(NamedTuple):
    """One thing to time. build: makes its step; is_profiled: whether three steps of it are."""

    name: str
    build: Callable[[Case], Step]
    is_profiled: bool = False


def our_name(recompute: str, schedule: str) -> str:
    return f"ours, {recompute}, {schedule}"


def subjects(compile_backend: str) -> list[Subject]:
    """All subjects; the first is the one that the others are compared with."""
    theirs = [
        Subject("open_clip", open_clip_step, True),
        Subject("open_clip, checkpointing", partial(open_clip_step, checkpointing=True)),
        Subject("open_clip, accumulating", partial(open_clip_step, accumulating=True)),
        Subject(
            "open_clip, compiled", partial(open_clip_step, compile_backend=compile_backend), True
        ),
        Subject(
            "open_clip, compiled, checkpointing",
            partial(open_clip_step, compile_backend=compile_backend, checkpointing=True),
        ),
    ]
    ours = [
        Subject(
            our_name(recompute, schedule),
            partial(our_step, recompute=recompute, keeps_graphs=schedule == "stash"),
            recompute == "none",
        )
        for schedule in SCHEDULES
        for recompute in RECOMPUTE
    ]
    base = partial(our_step, recompute="none", keeps_graphs=True)
    switches = [
        Subject("ours, pictures sent as bytes", partial(base, pictures="bytes")),
        Subject("ours, pictures sent as fp32", partial(base, pictures="fp32")),
        Subject("ours, loss in tiles", partial(base, tile=LOSS_TILE)),
    ]
    return [*theirs, *ours, *switches]


# ----------------------------------------------------------------------------------- OpenCLIP


@contextlib.contextmanager
def open_clip_switches() -> Iterator[None]:
    """What OpenCLIP's trainer sets for the whole process, for the time of its step alone; on a
    CPU, also without our seam, which is a torch-function mode."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    matmul.allow_tf32 = True
    no_seam = contextlib.nullcontext()
    if not torch.cuda.is_available():
        no_seam = torch._C.DisableTorchFunction()
    benchmark = not torch.are_deterministic_algorithms_enabled()
    try:
        with torch.backends.cudnn.flags(benchmark=benchmark, allow_tf32=True), no_seam:
            yield
    finally:
        matmul.allow_tf32 = before


def open_clip_step(
    case: Case,
    *,
    compile_backend: str | None = None,
    checkpointing: bool = False,
    accumulating: bool = False,
) -> Step:
    """OpenCLIP's trainer in amp_bf16 with fused AdamW and its ClipLoss.

    accumulating: `--accum-freq` of the case's microbatches, by its own two passes; otherwise the
    whole batch at once. checkpointing: `--grad-checkpointing`.
    """
    device = case.groups.device
    with device:
        model = open_clip.CLIP(**case.architecture.json)
    model.load_state_dict(case.weights)
    model.train()
    if checkpointing:
        model.set_grad_checkpointing(True)
    optimizer = torch.optim.AdamW(open_clip_groups(model), lr=LR, betas=BETAS, eps=EPS, fused=True)
    run = model
    if compile_backend is not None:
        run = torch.compile(model, backend=compile_backend)
    loss_function = open_clip.ClipLoss()
    autocast = partial(torch.autocast, device.type, torch.bfloat16)

    def whole() -> Tensor:
        with autocast():
            loss = loss_function(*run(case.images, case.texts))
        loss.backward()
        return loss

    def accumulated() -> Tensor:
        parts = list(zip(case.images.split(case.micro), case.texts.split(case.micro), strict=True))
        with torch.no_grad(), autocast():
            cached = [run(*part)[:2] for part in parts]
        images, texts = ([*side] for side in zip(*cached, strict=True))
        for number, part in enumerate(parts):
            with autocast():
                image, text, scale = run(*part)
                around = slice(number, number + 1)
                all_images, all_texts = images.copy(), texts.copy()
                all_images[around], all_texts[around] = [image], [text]
                loss = loss_function(torch.cat(all_images), torch.cat(all_texts), scale)
            loss.backward()
        return loss

    def step() -> float:
        with open_clip_switches():
            optimizer.zero_grad()
            loss = accumulated() if accumulating else whole()
            optimizer.step()
            with torch.no_grad():
                model.logit_scale.clamp_(0, math.log(100))
            return loss.item()

    return step


# --------------------------------------------------------------------------------------- ours


def our_step(
    case: Case,
    *,
    recompute: str,
    keeps_graphs: bool,
    pictures: str = "resident",
    tile: int | str = "auto",
) -> Step:
    """Our TrainStep in bf16. keeps_graphs: schedule stash, otherwise two-pass; pictures: resident
    on the device, or sent there in each step by the feed as bytes or as fp32."""
    groups, architecture = case.groups, case.architecture
    settings = Optimizer(lr=LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY)
    options = ModelOptions("bf16", recompute=recompute, deterministic=case.deterministic)
    stages = partition(architecture.costs, 1)
    built = build_train_state(architecture, options, stages, groups, settings)
    for parameter, tensor in built.global_parameters():
        built.set_weight(tensor, case.weights[parameter.name])
    stash = case.microbatches if keeps_graphs else 0
    step = TrainStep(built, ClipLoss(group=groups.data, tile=tile), stash, groups.pipeline)
    batches = resident_batches(case) if pictures == "resident" else sent_batches(case, pictures)
    return lambda: step(next(batches), LR).record.loss


def resident_batches(case: Case) -> Iterator[StepInputs]:
    """The case's batch again and again, its pictures on the device in fp32."""
    texts, images = case.texts.split(case.micro), case.images.split(case.micro)
    return itertools.repeat(
        StepInputs(texts, lambda number: Pictures(images[number].to(torch.bfloat16)))
    )


def sent_batches(case: Case, pictures: str) -> Iterator[StepInputs]:
    """Likewise, from page-locked memory of the host and by training's own feed. As bytes the
    pictures are others, of random colours."""
    size = case.architecture.vision.image_size
    images = case.images.cpu()
    if pictures == "bytes":
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, images.shape, dtype=torch.uint8, generator=generator)
    texts = case.texts.cpu()
    if case.groups.device.type == "cuda":
        images, texts = images.pin_memory(), texts.pin_memory()
    parts = zip(
        images.split(case.micro),
        texts.split(case.micro),
        torch.arange(case.pairs).split(case.micro),
        strict=True,
    )
    read = [Microbatch(*part, addresses=[], bad=[]) for part in parts]
    feed = DeviceFeed(
        itertools.repeat(read),
        case.architecture,
        plan_batch(case.groups.layout, case.pairs, case.micro),
        case.groups,
        torch.bfloat16,
        seed=0,
        preprocess=Preprocess(size) if pictures == "bytes" else None,
    )
    return (batch.inputs for batch in feed.batches(0, 2**31))
