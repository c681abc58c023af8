"""The time of a training step, predicted from a layout and a device's figures. No torch.

The seconds of each stage's microbatch go through the timeline of the pipeline's own schedule; what
is sent while something is computed counts as far as it takes longer. docs/planning.md says what is
left out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import ceil, log2, prod
from typing import TYPE_CHECKING

from parallel_clip.pipeline.timeline import Costs
from parallel_clip.plan.collective_time import Routes
from parallel_clip.plan.kernel_time import Kernels
from parallel_clip.plan.loss_time import loss_seconds
from parallel_clip.plan.pipeline_time import pipeline_seconds
from parallel_clip.plan.tower_time import NOTHING, How, Seconds, tower_time
from parallel_clip.stages.costs import ModelCosts, backward_cost
from parallel_clip.stages.handed_on import handed_on
from parallel_clip.stages.partition import chunks_of
from parallel_clip.stages.stage import LayerRange, Stage, whole_model

if TYPE_CHECKING:
    from parallel_clip.config import Config
    from parallel_clip.model.architecture import Architecture
    from parallel_clip.model.towers.transformer import TowerConfig
    from parallel_clip.plan.device_file import Device
    from parallel_clip.plan.layout_plan import LayoutPlan

# megatron-core's DDP sums gradients in buckets of so many parameters, or a million a data rank.
BUCKET = 40_000_000


@dataclass(frozen=True)
class StepTime:
    """A predicted step, in seconds.

    bubble: the part of the ranks' time, 0 to 1, in which they wait for one another's microbatches;
    compute: of the kernels of the rank that has most to do; communication: during which nothing is
    computed, by kind: "tensor" (of that rank), "pipeline", "data" (gradients and weights), "loss";
    optimizer: the update; loss: its computation; mfu: FLOPs of the model's forward and backward
    pass (without recomputation, second forward passes and padding) in parts of the peak.
    """

    seconds: float
    bubble: float
    compute: float
    communication: dict[str, float]
    optimizer: float
    loss: float
    samples_per_second: float
    mfu: float


def predict_step(
    plan: LayoutPlan,
    architecture: Architecture,
    config: Config,
    device: Device,
    nodes_of: int,
    costs: ModelCosts | None = None,
) -> StepTime:
    """Predict the time of a step, data being there in time.

    nodes_of: GPUs in a node; costs: of the model with what is frozen (`FrozenParts.costs_of`);
    None: nothing is.

    Raises:
        InputError: the device file has no figures for the precision or for links that are needed.
    """
    costs = costs or architecture.costs
    layout, batch = plan.layout, plan.batch
    routes = Routes(device, layout, nodes_of)
    step = _Step(plan, architecture, config, costs, Kernels(device, config.precision), routes)
    stages = _StageTimes(step)
    loss = loss_seconds(plan, device, routes)
    in_order = layout.pipeline, layout.virtual_pipeline, batch.microbatches, plan.stash
    with_messages = pipeline_seconds(*in_order, stages.timeline_costs(messages=True), loss.total)
    without = pipeline_seconds(*in_order, stages.timeline_costs(messages=False), loss.total)

    busy = [stages.busy(rank) for rank in range(layout.pipeline)]
    working = loss.total * (layout.pipeline if plan.loss_on_all_stages else 1)
    working += sum(of_rank.total for of_rank in busy)
    busiest = max(busy, key=lambda of_rank: of_rank.total)
    update = _Update(step)
    data = max(
        update.gradients_exposed(rank, stages) + update.gather(rank)
        for rank in range(layout.pipeline)
    )
    optimizer = max(update.optimizer(rank) for rank in range(layout.pipeline))
    seconds = with_messages + data + optimizer
    whole = whole_model(costs.vision.layers, costs.text.layers)
    of_pair = costs.with_captions(batch.captions)
    flops = batch.global_batch * (of_pair.total + backward_cost(whole, of_pair))
    return StepTime(
        seconds=seconds,
        bubble=max(0.0, 1 - working / (layout.pipeline * with_messages)),
        compute=busiest.compute,
        communication={
            "tensor": busiest.tensor,
            "pipeline": with_messages - without,
            "data": data,
            "loss": loss.communication,
        },
        optimizer=optimizer,
        loss=loss.compute,
        samples_per_second=batch.global_batch / seconds,
        mfu=flops / (seconds * layout.world * device.precision(config.precision).peak),
    )


@dataclass(frozen=True)
class _Step:
    """What is predicted: a step of a model by a plan, and what kernels and links take."""

    plan: LayoutPlan
    architecture: Architecture
    config: Config
    costs: ModelCosts
    kernels: Kernels
    routes: Routes


# ------------------------------------------------------------------------- a microbatch on a stage


class _StageTimes:
    """Seconds of one microbatch on each virtual stage: forward, backward, forward again."""

    def __init__(self, step: _Step):
        plan, architecture, costs, kernels = step.plan, step.architecture, step.costs, step.kernels
        self.plan, layout = plan, plan.layout
        how = How(
            kernels,
            plan.batch.micro_batch,
            layout.tensor,
            layout.sequence and layout.tensor > 1,
            step.config.recompute,
            step.routes.tensor,
        )
        vision = tower_time(architecture.vision, costs.vision, how)
        pairs, captions = plan.batch.micro_batch, plan.batch.captions
        text = tower_time(architecture.text, costs.text, replace(how, pairs=captions * pairs))
        self.forward, self.backward, self.again = [], [], []
        for stage in plan.stages:
            of_vision, of_text = vision.forward(stage.vision), text.forward(stage.text)
            self.forward.append(of_vision + of_text)
            self.again.append(
                (NOTHING if costs.vision.frozen.whole else of_vision)
                + (NOTHING if costs.text.frozen.whole else of_text)
            )
            self.backward.append(
                vision.backward(stage.vision, costs.vision) + text.backward(stage.text, costs.text)
            )
        sequence_ranks = layout.tensor if how.sequence else 1
        size = kernels.element * message_numbers(
            plan.stages, architecture, pairs, sequence_ranks, captions
        )
        self.message = step.routes.pipeline.message(size)

    def timeline_costs(self, messages: bool) -> Costs:
        forward, backward, again = (
            [seconds.total for seconds in of_pass]
            for of_pass in (self.forward, self.backward, self.again)
        )
        message = self.message if messages else 0.0
        return Costs(forward, backward, message, forward_again=again)

    def busy(self, rank: int) -> Seconds:
        """All that a pipeline rank does in a step but the loss."""
        count, ranks = self.plan.batch.microbatches, self.plan.layout.pipeline
        forward, backward, again = (
            sum(of_pass[rank::ranks], NOTHING)
            for of_pass in (self.forward, self.backward, self.again)
        )
        return count * (forward + backward) + (count - self.plan.stash) * again

    def last_backward(self, rank: int) -> float:
        """Seconds in which a rank's gradients become complete: its last microbatch's backward."""
        ranks = self.plan.layout.pipeline
        return sum(seconds.total for seconds in self.backward[rank::ranks])

    def drain(self, rank: int) -> float:
        """How long other ranks go on when a rank has done its last backward: those of the stages
        before."""
        return sum(seconds.total for seconds in self.backward[:rank])


def message_numbers(
    stages: Sequence[Stage],
    architecture: Architecture,
    pairs: int,
    sequence_ranks: int,
    captions: int = 1,
) -> int:
    """How many numbers a stage hands on, as `MessageLayout.length` in model/handover.py."""

    def of(held: LayerRange, tower: TowerConfig, count: int) -> int:
        sizes = tower.training_tokens, tower.width, architecture.embed_dim
        return prod(handed_on(held, count, *sizes, sequence_ranks) or (0,))

    sizes = (
        of(stage.vision, architecture.vision, pairs)
        + of(stage.text, architecture.text, captions * pairs)
        for stage in stages[:-1]
    )
    return max(sizes, default=0)


# -------------------------------------------------------------------- gradients, optimizer, weights


class _Update:
    """What follows the last backward: sums of gradients, the update, the gathering of weights."""

    def __init__(self, step: _Step):
        self.plan, self.config, self.routes = step.plan, step.config, step.routes
        self.kernels, layout = step.kernels, step.plan.layout
        self.splits = step.config.parallel.distributed_optimizer and layout.data > 1
        self.trained = [
            sum(
                trained_parameters(stage, step.architecture, step.costs, layout.tensor)
                for stage in chunks_of(step.plan.stages, layout.pipeline, rank)
            )
            for rank in range(layout.pipeline)
        ]

    def gradients_exposed(self, rank: int, stages: _StageTimes) -> float:
        """Seconds of the sum over data ranks, fp32, that go on when the last stage of all has done
        its backward. The sum of a bucket begins when its gradients are complete."""
        ranks, count = self.plan.layout.data, self.trained[rank]
        sum_over = self.routes.data.all_gather if self.splits else self.routes.data.all_reduce
        seconds = sum_over(4 * count, ranks)
        buckets = max(1, ceil(count / max(BUCKET, 1_000_000 * ranks)))
        hidden = (1 - 1 / buckets) * stages.last_backward(rank)
        exposed = max(seconds / buckets, seconds - hidden)
        return max(0.0, exposed - stages.drain(rank))

    def gather(self, rank: int) -> float:
        """Seconds in which data ranks get one another's updated weights, and in which all ranks
        tell each other loss and gradient norm."""
        told = 3 * self.routes.world.latency * ceil(log2(self.plan.layout.world))
        if not self.splits:
            return told
        size = self.kernels.element * self.trained[rank]
        return told + self.routes.data.all_gather(size, self.plan.layout.data)

    def optimizer(self, rank: int) -> float:
        """Seconds in which gradients are cleared and checked, and a rank updates its part: masters,
        both moments and gradients in fp32, and the weights that are made from masters."""
        element, count = self.kernels.element, self.trained[rank]
        part = count / self.plan.layout.data if self.splits else count
        size = 8 * count + (4 + 28 + 4 + element) * part
        if self.config.optimizer.clip_grad_norm is not None:
            size += 8 * part
        if self.config.ema.decay is not None:
            size += 12 * part / self.config.ema.every
        return self.kernels.streaming(size / element)


_BLOCK = re.compile(r"block\.layers\.(\d+)\.")
_HEAD = ("post_norm", "projection", "pool")


@cache
def _tower_parameters(tower: TowerConfig, embed_dim: int, tensor: int) -> tuple[int, int, int]:
    """Numbers that each of `tensor` ranks holds of a tower's embedding, of a block, of its head."""
    embedding = block = head = 0
    for parameter in tower.parameters(embed_dim):
        numbers, found = prod(parameter.local_shape(tensor)), _BLOCK.match(parameter.module)
        if found is not None:
            block += numbers * (found[1] == "0")
        elif parameter.module.startswith(_HEAD):
            head += numbers
        else:
            embedding += numbers
    return embedding, block, head


def trained_parameters(
    stage: Stage, architecture: Architecture, costs: ModelCosts, tensor: int
) -> int:
    """Numbers that a rank of a stage trains; norms of frozen layers are not counted."""
    total = 0
    for tower, of_tower, held in (
        (architecture.vision, costs.vision, stage.vision),
        (architecture.text, costs.text, stage.text),
    ):
        frozen = of_tower.frozen
        if frozen.whole:
            continue
        embedding, block, head = _tower_parameters(tower, architecture.embed_dim, tensor)
        layers = held.stop - min(max(frozen.matrices, held.first), held.stop)
        total += layers * block + held.has_head * head
        total += (held.has_embedding and not frozen.embedding) * embedding
    return total
