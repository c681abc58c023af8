"""The arithmetic of a layout: stages, batch, stash, ranks that work on the loss.

No torch and no files, so that a search can ask for a thousand layouts in a second.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from parallel_clip.errors import InputError
from parallel_clip.layout import BatchPlan, Layout, check_microbatches, check_model, plan_batch
from parallel_clip.loss.exchange_plan import ExchangePlan, peak_loss_bytes, plan_exchange
from parallel_clip.pipeline.orders import PipelineOp, microbatch_group_size, step_orders
from parallel_clip.stages.costs import ModelCosts
from parallel_clip.stages.partition import partition
from parallel_clip.stages.stage import Stage

if TYPE_CHECKING:
    from parallel_clip.config import Config, Loss, Parallel

# Pairs of a global batch from which on a loss shared by two stages is quicker, its features and
# gradients passed about included: `python benchmarks/loss.py`, on a CPU.
LARGE_LOSS = 1024


@dataclass(frozen=True)
class LayoutPlan:
    """How one optimizer step is spread over the ranks.

    stages: layers of each pipeline stage, in the order in which data pass through them; stash:
    microbatches of a step that keep their graphs (see pipeline/forward_backward.py); loss: the
    settings of the config; embed_dim: width of the features.
    """

    layout: Layout
    stages: tuple[Stage, ...]
    batch: BatchPlan
    stash: int
    loss: Loss
    embed_dim: int

    @property
    def microbatch_group(self) -> int | None:
        """Microbatches that pass through one virtual stage before the next one's turn; None: no
        virtual stages."""
        if self.layout.virtual_pipeline == 1:
            return None
        return microbatch_group_size(self.batch.microbatches, self.layout.pipeline)

    def orders(self, stash: int) -> list[list[PipelineOp]]:
        """What each pipeline rank runs in a step that keeps `stash` microbatches, in order."""
        layout, count = self.layout, self.batch.microbatches
        return step_orders(layout.pipeline, count, stash, layout.virtual_pipeline)

    @property
    def loss_on_all_stages(self) -> bool:
        """Whether all stages work on the loss. Where microbatches run forward again, the other
        stages have begun with that while the last one is at the loss; where none does, they wait.
        """
        if self.layout.pipeline == 1 or self.loss.stages == "last":
            return False
        waiting = self.stash == self.batch.microbatches
        return self.loss.stages == "all" or waiting and self.batch.global_batch >= LARGE_LOSS

    @property
    def loss_helpers(self) -> int:
        """Ranks that hold the same pairs and share the work of the loss."""
        return self.layout.tensor * (self.layout.pipeline if self.loss_on_all_stages else 1)

    @property
    def exchange(self) -> ExchangePlan:
        """How the loss exchanges texts and tiles its logits."""
        return plan_exchange(
            self.loss.exchange, self.loss.tile, *self._loss_sizes(self.loss_helpers)
        )

    def peak_loss_bytes(self, helpers: int) -> int:
        """An upper bound of what a rank's loss holds at once, where so many ranks help."""
        sizes = self._loss_sizes(helpers)
        return peak_loss_bytes(plan_exchange(self.loss.exchange, self.loss.tile, *sizes), *sizes)

    def _loss_sizes(self, helpers: int) -> tuple[int, int, int, int, int]:
        """What `exchange_plan` asks for, where so many ranks help."""
        batch = self.batch
        return batch.per_rank, self.embed_dim, self.layout.data, helpers, batch.captions

    def largest_stash(self, filled: Callable[[int], int], limit: int) -> int | None:
        """The most microbatches that can keep their graphs where a rank may fill `limit` bytes;
        None where not even two-pass fits. filled: the bytes of the fullest rank by the stash; the
        more are kept, the more is filled."""
        # With virtual stages those that run again are whole groups: a group in part would stall
        # the others (see timeline.py).
        group = self.microbatch_group or 1
        candidates = sorted({0, *range(self.batch.microbatches, 0, -group)})
        fitting = bisect_right(candidates, limit, key=filled)
        return candidates[fitting - 1] if fitting else None

    def costs_on_ranks(self, costs: ModelCosts) -> ModelCosts:
        """Of a pair with all its texts, on the tensor ranks together: by what stages compare."""
        return costs.with_captions(self.batch.captions).on_tensor_ranks(self.layout.tensor)


@dataclass(frozen=True)
class DoesNotFit:
    """Why a layout cannot train a model: the message of its InputError."""

    reason: str


def make_layout_plan(costs: ModelCosts, world: int, config: Config) -> LayoutPlan:
    """Spread a model and a global batch over `world` ranks, as a config asks.

    Raises:
        InputError: the sizes do not divide; the message has the nearest that do.
    """
    parallel, batch = config.parallel, config.batch
    # Before a world is asked for that cannot help.
    check_model(parallel.tensor, costs, parallel.pad)
    sizes = parallel.tensor, parallel.pipeline, parallel.virtual_pipeline
    layout = Layout(world, *sizes, parallel.sequence)
    captions = config.data.captions_per_image
    on_ranks = costs.with_captions(captions).on_tensor_ranks(layout.tensor)
    stages = partition(on_ranks, layout.pipeline, layout.virtual_pipeline, parallel.stages)
    batch_plan = plan_batch(layout, batch.global_, batch.micro, captions)
    check_microbatches(layout, batch_plan)
    stash = choose_stash(parallel, batch_plan.microbatches)
    return LayoutPlan(layout, stages, batch_plan, stash, config.loss, costs.embed_dim)


def try_layout_plan(costs: ModelCosts, world: int, config: Config) -> LayoutPlan | DoesNotFit:
    """As `make_layout_plan`; what does not fit comes as a value with its reason."""
    try:
        return make_layout_plan(costs, world, config)
    except InputError as error:
        return DoesNotFit(str(error))


def choose_stash(parallel: Parallel, microbatches: int) -> int:
    """The number of microbatches that keep their graphs, from 0 (two-pass) to all (stash).

    `auto` keeps all graphs if a step has no more microbatches than the pipeline has stages, as the
    first stage of 1F1B holds that many anyway, and otherwise none. Where the memory of a rank is
    known, plan/memory_of_run.py replaces the choice by what there is room for.

    Raises:
        InputError: `parallel.stash` is more than there are microbatches, or contradicts
            `parallel.schedule`.
    """
    schedule, asked = parallel.schedule, parallel.stash
    meant = {"two-pass": 0, "stash": microbatches}.get(schedule)
    if asked == "auto":
        if meant is not None:
            return meant
        return microbatches if microbatches <= parallel.pipeline else 0
    if meant is not None and asked != meant:
        raise InputError(
            f"parallel.schedule {schedule} keeps the graphs of {meant} microbatches, and "
            f"parallel.stash is {asked}; set parallel.schedule to auto, or leave "
            "parallel.stash out"
        )
    if asked > microbatches:
        raise InputError(
            f"parallel.stash {asked} is more than the {microbatches} microbatches of a step; set "
            f"it to {microbatches} or fewer, or to auto"
        )
    return asked


def stash_is_open(parallel: Parallel) -> bool:
    """Whether it is left to the memory of a rank how many microbatches keep their graphs."""
    return (parallel.schedule, parallel.stash) == ("auto", "auto")
