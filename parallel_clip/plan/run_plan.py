"""Resolve a config into the plan of a run: one value, found on rank 0 and handed to all ranks.

The same function serves `train` and `train --dry-run`, so both find the same errors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from parallel_clip.config import Config
from parallel_clip.convert.choose_model import resolve_preprocess
from parallel_clip.convert.initial_weights import InitialWeights
from parallel_clip.convert.weight_source import SourceMetadata
from parallel_clip.data.feeding.open import check_samples
from parallel_clip.data.feeding.run_shards import RunShards, find_run_shards
from parallel_clip.data.order.run_order import Stretch, taken_by
from parallel_clip.data.samples.tokenizer import TokenizerSource
from parallel_clip.data.samples.transforms import Preprocess, check_augment_options
from parallel_clip.engine.versions import versions
from parallel_clip.evaluate.held_out import ClassPrompts, read_class_prompts
from parallel_clip.layout import BatchPlan, Layout, training_steps
from parallel_clip.model.architecture import Architecture
from parallel_clip.model.frozen import FrozenParts
from parallel_clip.plan.build import frozen_parts
from parallel_clip.plan.layout_plan import LayoutPlan, make_layout_plan
from parallel_clip.plan.logit_start import LogitStart
from parallel_clip.plan.memory import RankMemory
from parallel_clip.plan.memory_limit import Machine, ranks_on_machine
from parallel_clip.plan.phase_models import phase_models
from parallel_clip.plan.prediction import Prediction
from parallel_clip.plan.resume import ResumePoint, find_resume_point
from parallel_clip.plan.same_samples import listed_before, require_same_data, require_same_past
from parallel_clip.plan.segment_plan import SegmentPlan, plan_segments, told_of_phase
from parallel_clip.plan.segments import find_segments, sample_stretches
from parallel_clip.plan.start_model import check_trainable, find_start_model
from parallel_clip.plan.update_words import update_words


class BlendPlan(NamedTuple):
    """What the order of a blend of sources makes of their shards.

    pairs: in an epoch, of each source of the run; streams: of the order; sample_bytes: of a sample
    on average, None where it is not known; is_fetched: whether shards are fetched from addresses.
    """

    pairs: tuple[int, ...]
    streams: int
    sample_bytes: float | None
    is_fetched: bool

    @property
    def epoch(self) -> int:
        """All pairs of an epoch."""
        return sum(self.pairs)


@dataclass(frozen=True)
class RunPlan:
    """What a run does, on which ranks, from where and how long. Data only: no open files.

    model: that of the config, which phases change; segments: the parts of the run in which nothing
    changes, in order; initial: where the weights of a run that begins are from, None where they are
    random or it goes on; tokenizer_name: what a checkpoint notes as `data.tokenizer`; steps: of the
    whole run; data_fingerprint: what the order of samples is computed from; blends: of
    `training_sources`; left_out: paths of the shards that `data.missing: skip` does without;
    prompts: of `evaluate.zero_shot`; versions: of the packages on rank 0; notes: what to tell of
    the model, its preprocessing and its updates; logits: what a run that begins has in place of its
    weights' multiplier and bias.

    What `resume` says decides which segment it is that runs: with another one, it is the plan of
    another part of the run.
    """

    config: Config
    model: Architecture
    segments: tuple[SegmentPlan, ...]
    resume: ResumePoint
    initial: InitialWeights | None
    tokenizer: TokenizerSource
    tokenizer_name: str | None
    steps: int
    data_fingerprint: dict[str, Any]
    blends: tuple[BlendPlan, ...]
    left_out: tuple[str, ...]
    prompts: ClassPrompts | None
    versions: dict[str, str | None]
    notes: tuple[str, ...]
    logits: LogitStart = LogitStart()

    @property
    def current(self) -> SegmentPlan:
        """The segment of the step after the one resumed from; of that one itself where its
        evaluation is still to be done."""
        return self._segment_of(self.resume.step - self.evaluates_first)

    @property
    def stop(self) -> int:
        """The last step, counted from 1, of the current model: up to there it stays as it is built,
        whatever becomes of the learning rate."""
        stop, freeze = self.current.segment.stop, self.current.segment.freeze
        for later in self.segments:
            if later.segment.first == stop and later.trains(self.architecture, freeze):
                stop = later.segment.stop
        return stop

    def peak_at(self, step: int) -> float:
        """The highest learning rate of the phase of step `step`, counted from 0."""
        return self._segment_of(step).segment.lr

    @property
    def stretches(self) -> tuple[Stretch, ...]:
        """Which positions of the run are of the order of which blend."""
        return sample_stretches((each.segment for each in self.segments), self.batch.global_batch)

    def epochs_by(self, position: int) -> int:
        """How many epochs, of all blends together, end by a position of the run."""
        taken = taken_by(self.stretches, position)
        return sum(taken[number] // blend.epoch for number, blend in enumerate(self.blends))

    def _segment_of(self, step: int) -> SegmentPlan:
        found = (each for each in self.segments if step < each.segment.stop)
        return next(found, self.segments[-1])

    @property
    def architecture(self) -> Architecture:
        return self.current.architecture

    @property
    def layout_plan(self) -> LayoutPlan:
        return self.current.layout_plan

    @property
    def preprocess(self) -> Preprocess:
        return self.current.preprocess

    @property
    def memory(self) -> tuple[RankMemory, ...] | None:
        return self.current.memory

    @property
    def prediction(self) -> Prediction | None:
        return self.current.prediction

    @property
    def layout(self) -> Layout:
        return self.layout_plan.layout

    @property
    def batch(self) -> BatchPlan:
        return self.layout_plan.batch

    @property
    def frozen(self) -> FrozenParts:
        return self.current.frozen

    @property
    def trained_since(self) -> dict[str, int]:
        """After how many updates parameters began to be trained that were frozen, by name."""
        before = self.resume.meta
        return before.trained_since_with(self.frozen.names) if before else {}

    @property
    def run_dir(self) -> Path:
        return Path(self.config.run_dir)

    @property
    def is_finished(self) -> bool:
        return self.resume.step >= self.steps and not self.evaluates_first

    @property
    def evaluates_first(self) -> bool:
        """Whether the run ended in the evaluation of the step that it resumes from."""
        step = self.resume.step
        return step > 0 and self.evaluates_after(step) and not self.resume.is_evaluated

    def evaluates_after(self, step: int) -> bool:
        every = self.config.evaluate.every
        return every > 0 and (step % every == 0 or step == self.steps)


def make_run_plan(
    config: Config, world_size: int, *, dry_run: bool = False, machine: Machine | None = None
) -> tuple[RunPlan, RunShards]:
    """Resolve a config into a RunPlan for `world_size` ranks, and the shards that it trains on.

    Checks everything, data included; reads files, writes none, starts nothing. The index of shards
    that had none is in the second value, still to be saved. Memory is counted in a dry run, where
    `parallel.memory` limits it, and where a GPU's may let more graphs be kept; that takes seconds a
    stage, and a process that has joined no process group. A dry run also takes counts from files
    beside shards for an index.

    Raises:
        InputError: whatever is wrong, with the way out.
    """
    resume = find_resume_point(config)
    start = find_start_model(config, resume)
    config, models = start.config, phase_models(start.config, start.architecture)
    check_trainable(start.architecture, config.model.override)
    kept = require_same_past(resume, config)
    updates = update_words(start.architecture, config.optimizer, config.freeze)
    for number, model in enumerate(models):  # before shards are looked for, which may take long
        with told_of_phase(config, number):
            make_layout_plan(frozen_parts(model, config.freeze).costs_of(model), world_size, config)
    chosen = config.data.model_dump(include={"mean", "std", "interpolation", "resize_mode"})
    options = ", ".join(f"data.{key}" for key, value in chosen.items() if value is not None)
    preprocess = [*start.preprocess, (options, chosen)]
    resolve_preprocess(start.architecture.vision.image_size, preprocess)
    if config.data.augment == "train":
        check_augment_options(config.data.augment_options)
    tokenizer = _tokenizer_source(config, resume, start.tokenizer_from)
    built_tokenizer = tokenizer.build(start.architecture.text)
    tokenizer_path = built_tokenizer.path

    prompts = read_class_prompts(config.evaluate.zero_shot)
    begun_with = listed_before(Path(config.run_dir), kept) if resume.checkpoint else None
    shards = find_run_shards(config, print, counts_suffice=dry_run, begun_with=begun_with)
    check_samples(config, shards)
    # Epochs count where all phases have one blend.
    epoch = shards.orders[0].samples_per_epoch
    steps = training_steps(config.train, epoch, config.batch.global_, config.schedule)
    fingerprint = shards.fingerprint
    if resume.step < steps:  # else there is nothing to resume
        require_same_data(resume, fingerprint, kept, lambda: shards.listed, Path(config.run_dir))
    segments, memory_notes = plan_segments(
        config,
        models,
        find_segments(config, steps),
        preprocess,
        world_size,
        machine or Machine(ranks_on_machine(world_size), asks_gpu=not dry_run),
        dry_run,
        resume.step,
    )
    plan = RunPlan(
        config,
        start.architecture,
        segments,
        resume,
        start.initial,
        tokenizer,
        str(Path(tokenizer_path).absolute()) if tokenizer_path else config.data.tokenizer,
        steps,
        fingerprint,
        tuple(
            BlendPlan(
                tuple(order.source_samples),
                order.streams,
                shards.sample_bytes(order),
                shards.is_fetched(order),
            )
            for order in shards.orders
        ),
        tuple(shards.left_out),
        prompts,
        versions(),
        (),
        start.logits,
    )
    _, words = resolve_preprocess(plan.architecture.vision.image_size, preprocess)
    notes = start.notes, (f"preprocessing: {words}",), built_tokenizer.notes, updates, memory_notes
    return replace(plan, notes=tuple(chain(*notes))), shards


def _tokenizer_source(
    config: Config, resume: ResumePoint, stored: SourceMetadata | None
) -> TokenizerSource:
    """`data.tokenizer`, else that of what is begun with. Where the files of a run that goes on are
    gone, its checkpoint has them."""
    choice = config.data.tokenizer
    is_gone = choice not in (None, "openclip") and not Path(choice).exists()
    if stored is None:
        return TokenizerSource(choice, None)
    if choice is None or (is_gone and resume.checkpoint is not None):
        choice = stored.tokenizer
    return TokenizerSource(choice, stored.folder)
