"""Pipelines of real processes whose stages only sleep, and the record of when each computes.

Everything but the computing is real: processes, gloo messages, the project's two passes through
megatron-core's schedules, its data-parallel wrapping. A sleep takes a known time and no core, so
that eight stages run at once on any machine. The record is taken around megatron-core's own
`forward_step` and `backward_step`, so that it is the same for a real model.
"""

from __future__ import annotations

import pickle
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import schedules
from torch import Tensor, nn

from parallel_clip.config import Optimizer
from parallel_clip.engine.groups import Groups, close_groups, join_world, make_groups
from parallel_clip.engine.launch import Launch
from parallel_clip.layout import Layout
from parallel_clip.loss import ClipLoss
from parallel_clip.model.architecture import Architecture
from parallel_clip.model.clip import Again, CLIPModel
from parallel_clip.model.initialize import initial_value
from parallel_clip.model.megatron_config import ModelOptions
from parallel_clip.model.openclip_json import architecture_from_json
from parallel_clip.optimizer.train_state import build_train_state, wrap_for_data_parallel
from parallel_clip.pipeline.forward_backward import LossFunction, TwoPassStep, forward_backward
from parallel_clip.pipeline.inputs import Pictures, StepInputs
from parallel_clip.pipeline.orders import OpKind, PipelineOp, microbatch_group_size
from parallel_clip.pipeline.timeline import Costs, Span
from parallel_clip.stages.partition import chunks_of, partition

REAL_PAIRS = 8  # in a microbatch of the real model


@dataclass(frozen=True)
class Case:
    """A step to measure.

    towers: seconds that each virtual stage sleeps; two where the towers' pipelines take turns.
    None: a small real model instead.
    overlap: megatron-core's `overlap_p2p_comm`, for interleaved pipelines.
    """

    ranks: int
    microbatches: int
    stash: int = 0
    chunks: int = 1
    towers: tuple[Costs, ...] | None = None
    overlap: bool = False


@dataclass(frozen=True)
class Step:
    """A measured step: `spans` by rank, then by time, and `total`, in seconds from its start."""

    spans: list[Span]
    total: float


def measure(cases: Sequence[Case], steps: int) -> list[list[Step]]:
    """So many warm steps of each case, in as many real processes as it has ranks.

    Raises:
        torch.multiprocessing.ProcessRaisedException: a rank failed; it has the rank's traceback.
    """
    found: dict[int, list[Step]] = {}
    for ranks in sorted({case.ranks for case in cases}):
        numbers = [number for number, case in enumerate(cases) if case.ranks == ranks]
        of_ranks = [cases[number] for number in numbers]
        found |= zip(numbers, _in_processes(ranks, of_ranks, steps), strict=True)
    return [found[number] for number in range(len(cases))]


def _in_processes(ranks: int, cases: Sequence[Case], steps: int) -> Iterator[list[Step]]:
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_serve, (cases, steps, Path(folder)), nprocs=ranks)
        records = [
            pickle.loads(Path(folder, f"{rank}.pickle").read_bytes()) for rank in range(ranks)
        ]
    for of_case in zip(*records, strict=True):
        yield [_merged(of_step) for of_step in zip(*of_case, strict=True)]


def _merged(ranks: Sequence[_RankStep]) -> Step:
    began = min(step.began for step in ranks)
    spans = [
        Span(rank, op, start - began, end - began)
        for rank, step in enumerate(ranks)
        for op, start, end in step.ops
    ]
    return Step(spans, max(step.ended for step in ranks) - began)


# -------------------------------------------------------------------------------- in each process


@dataclass
class _RankStep:
    """Clock times of one rank. `perf_counter` is one clock for all processes of a Linux machine."""

    began: float = 0.0
    ended: float = 0.0
    ops: list[tuple[PipelineOp, float, float]] = field(default_factory=list)


def _serve(rank: int, cases: Sequence[Case], steps: int, folder: Path) -> None:
    torch.set_num_threads(1)
    records = []
    for number, case in enumerate(cases):
        store = dist.FileStore(str(folder / f"meet-{number}"), case.ranks)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=case.ranks)
        layout = Layout(case.ranks, pipeline=case.ranks, virtual_pipeline=case.chunks)
        join_world(Launch(rank, rank, case.ranks))
        groups = make_groups(layout)
        records.append(_steps(groups, case, steps))
        close_groups()
    Path(folder, f"{rank}.pickle").write_bytes(pickle.dumps(records))


def _steps(groups: Groups, case: Case, steps: int) -> list[_RankStep]:
    if case.towers is None:
        towers, inputs = [_real_stages(groups, case)], _real_inputs
        loss = ClipLoss(group=groups.data)
    else:
        towers = [_sleeping_stages(groups, case, costs) for costs in case.towers]
        inputs, loss = _no_inputs, _trivial_loss
    opening = inputs(_group_size(case) or case.ranks)
    _step(towers, opening, loss, stash=0)  # opens connections
    records = []
    for _ in range(steps):
        for chunk in sum(towers, []):
            chunk.zero_grad_buffer()
        recorder = _Recorder(towers, case.microbatches)
        with recorder.installed():
            dist.barrier()
            recorder.step.began = time.perf_counter()
            _step(towers, inputs(case.microbatches), recorder.timed(loss), case.stash)
            recorder.step.ended = time.perf_counter()
        records.append(recorder.step)
    return records


def _step(
    towers: Sequence[Sequence[DistributedDataParallel]],
    inputs: StepInputs,
    loss: LossFunction,
    stash: int,
) -> None:
    """One pipeline's step, or those of two that take turns, around one loss."""
    if len(towers) == 1:
        forward_backward(towers[0], inputs, loss, stash)
        return
    first, second = (TwoPassStep(chunks, inputs, loss, stash) for chunks in towers)
    first.loss = _trivial_loss
    for run in ("first_pass", "compute_loss", "second_pass"):
        for tower in (first, second):
            getattr(tower, run)()


class _Recorder:
    """When this rank runs which op of a step.

    What a forward step did is seen from whether the model was called in it, and with gradients.
    Of two towers the second's microbatches count on from the first's, as in tower_comparison.py.
    """

    def __init__(self, towers: Sequence[Sequence[DistributedDataParallel]], microbatches: int):
        self.step = _RankStep()
        self._places = {
            id(ddp): (tower * microbatches, chunk)
            for tower, chunks in enumerate(towers)
            for chunk, ddp in enumerate(chunks)
        }
        self._modules = [ddp.module for chunks in towers for ddp in chunks]
        self._called_with_grad: bool | None = None
        self._passed_once: set[tuple[int, int]] = set()
        self._outputs: dict[int, tuple[int, int]] = {}

    @contextmanager
    def installed(self) -> Iterator[None]:
        def note_call(*_: Any) -> None:
            self._called_with_grad = torch.is_grad_enabled()

        hooks = [module.register_forward_pre_hook(note_call) for module in self._modules]
        forward = mock.patch.object(
            schedules, "forward_step", self._forward(schedules.forward_step)
        )
        backward = mock.patch.object(
            schedules, "backward_step", self._backward(schedules.backward_step)
        )
        with forward, backward:
            yield
        for hook in hooks:
            hook.remove()

    def timed(self, loss: LossFunction) -> LossFunction:
        def run(*arguments: Any, **options: Any) -> Tensor:
            start = time.perf_counter()
            value = loss(*arguments, **options)
            self._record(PipelineOp(OpKind.LOSS), start)
            return value

        return run

    def _forward(self, forward_step: Callable) -> Callable:
        def run(function, data, model, *arguments: Any, current_microbatch: int, **options: Any):
            self._called_with_grad = None
            start = time.perf_counter()
            result = forward_step(
                function, data, model, *arguments, current_microbatch=current_microbatch, **options
            )
            first, chunk = self._places[id(model)]
            place = (first + current_microbatch, chunk)
            self._record(PipelineOp(self._forward_kind(place), *place), start)
            self._passed_once.add(place)
            self._outputs[id(result[0])] = place
            return result

        return run

    def _forward_kind(self, place: tuple[int, int]) -> OpKind:
        if self._called_with_grad is None:
            return OpKind.REPLAY
        if place in self._passed_once:
            return OpKind.FORWARD_AGAIN
        return (
            OpKind.FORWARD_KEEPING_GRAPH if self._called_with_grad else OpKind.FORWARD_WITHOUT_GRAPH
        )

    def _backward(self, backward_step: Callable) -> Callable:
        def run(received: Any, output: Any, *arguments: Any):
            start = time.perf_counter()
            result = backward_step(received, output, *arguments)
            self._record(PipelineOp(OpKind.BACKWARD, *self._outputs[id(output)]), start)
            return result

        return run

    def _record(self, op: PipelineOp, start: float) -> None:
        self.step.ops.append((op, start, time.perf_counter()))


# ------------------------------------------------------------------------------- stages that sleep


class SleepingStage(CLIPModel):
    """A stage that sleeps. What the schedules ask of a stage is CLIPModel's."""

    def __init__(
        self,
        architecture: Architecture,
        options: ModelOptions,
        groups: Groups,
        stages,
        number,
        costs: Costs,
    ):
        super().__init__(architecture, options, groups.tensor, stages, number)
        self.seconds = costs.forward[number], costs.backward[number]
        self.vision = self.text = None
        self.weight = nn.Parameter(torch.zeros(1))
        if self.logit_scale is not None:
            nn.init.zeros_(self.logit_scale)

    def forward(
        self,
        images: Tensor | None,
        tokens: Tensor,
        kept: Tensor | None = None,
        again: Again | None = None,
    ) -> Tensor:
        pairs = len(tokens)
        if self.stage.is_last:
            shape = (2 * pairs, self.architecture.embed_dim)
        else:
            shape = (self.messages.length(pairs, self.training), 1, 1)
        return _Sleep.apply(self.input_tensor, self.weight, self.seconds, shape)


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, received, weight, seconds: tuple[float, float], shape) -> Tensor:
        ctx.backward_seconds = seconds[1]
        ctx.received_shape = None if received is None else received.shape
        time.sleep(seconds[0])
        return weight.new_zeros(shape)

    @staticmethod
    def backward(ctx, grad: Tensor):
        time.sleep(ctx.backward_seconds)
        shape = ctx.received_shape
        return None if shape is None else grad.new_zeros(shape), grad.new_zeros(1), None, None


def _group_size(case: Case) -> int | None:
    return microbatch_group_size(case.microbatches, case.ranks) if case.chunks > 1 else None


def _trivial_loss(
    images: Tensor, texts: Tensor, multiplier: Tensor, bias: Tensor | None, *, identities: None
) -> Tensor:
    return multiplier * (images.sum() + texts.sum())


def _no_inputs(microbatches: int) -> StepInputs:
    tokens = torch.zeros(1, 1, dtype=torch.long)
    return StepInputs([tokens] * microbatches, lambda _: Pictures(torch.empty(0)))


def _sleeping_stages(groups: Groups, case: Case, costs: Costs) -> list[DistributedDataParallel]:
    tower = {"width": 8, "layers": case.ranks * case.chunks}
    architecture = architecture_from_json(
        {
            "embed_dim": 8,
            "vision_cfg": {**tower, "image_size": 8, "patch_size": 8, "head_width": 8},
            "text_cfg": {**tower, "context_length": 2, "vocab_size": 2, "heads": 1},
        },
        "asleep",
    )
    stages = partition(architecture.costs, case.ranks, case.chunks)
    options = ModelOptions(virtual_pipeline=case.chunks, microbatch_group=_group_size(case))
    chunks = [
        SleepingStage(architecture, options, groups, stages, stage.number, costs)
        for stage in chunks_of(stages, case.ranks, groups.pipeline_rank)
    ]
    for chunk in chunks:
        chunk.config.overlap_p2p_comm = case.overlap
    return wrap_for_data_parallel(chunks, distributed_optimizer=False)


# ----------------------------------------------------------------------------------- a real model

REAL = architecture_from_json(
    {
        "embed_dim": 128,
        "vision_cfg": {
            "width": 256, "layers": 6, "head_width": 64, "image_size": 64, "patch_size": 8,
        },
        "text_cfg": {
            "width": 256, "layers": 6, "heads": 4, "context_length": 32, "vocab_size": 1000,
        },
    },
    "small",
)  # fmt: skip


def _real_stages(groups: Groups, case: Case) -> list[DistributedDataParallel]:
    stages = partition(REAL.costs, case.ranks, case.chunks)
    built = build_train_state(REAL, ModelOptions(), stages, groups, Optimizer())
    for parameter, tensor in built.global_parameters():
        built.set_weight(tensor, initial_value(parameter, seed=0))
    return built.wrapped


def _real_inputs(microbatches: int) -> StepInputs:
    images = torch.randn(REAL_PAIRS, 3, *REAL.vision.image_size)
    tokens = torch.randint(1, 1000, (REAL_PAIRS, REAL.text.context_length))
    return StepInputs([tokens] * microbatches, lambda _: Pictures(images))
