"""What a config comes to on a number of processes, found out before anything is started.

The same checks serve `train` and `train --dry-run`, so both find the same errors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from parallel_clip.config import Config
from parallel_clip.convert.open import open_source
from parallel_clip.convert.weight_source import ModelWeights, SourceMetadata
from parallel_clip.data.feeding.open import check_first_samples, open_training_data
from parallel_clip.data.feeding.training_data import TrainingData
from parallel_clip.data.index.shard_table import ShardTable
from parallel_clip.data.samples.tokenizer import Tokenizer, build_tokenizer
from parallel_clip.data.samples.transforms import Preprocess
from parallel_clip.errors import InputError
from parallel_clip.evaluate.held_out import check_held_out
from parallel_clip.layout import (
    BatchPlan,
    Layout,
    check_microbatches,
    check_model,
    plan_batch,
    training_steps,
)
from parallel_clip.model.architecture import Architecture
from parallel_clip.model.known_models import load_architecture, with_logit_defaults
from parallel_clip.model.megatron_config import ModelOptions
from parallel_clip.plan.layout_plan import choose_stash, stages_of
from parallel_clip.plan.resume import ResumePoint, _require_same_data, find_resume_point
from parallel_clip.stages.stage import Stage

Print = Callable[[str], None]

# Pairs of a global batch from which on a loss shared by two stages is quicker, its features and
# gradients passed about included: `python benchmarks/loss.py`, on a CPU.
LARGE_LOSS = 1024


@dataclass(frozen=True)
class Job:
    """A checked config: the model, who does what, and where to begin."""

    config: Config
    architecture: Architecture
    layout: Layout
    plan: BatchPlan
    resume: ResumePoint
    preprocess: Preprocess
    tokenizer: Tokenizer
    initial: ModelWeights | None
    stages: tuple[Stage, ...]
    stash: int  # microbatches of a step that keep their graphs, see pipeline/schedule.py

    @property
    def loss_on_all_stages(self) -> bool:
        """Whether all stages work on the loss. Where microbatches run forward again, the other
        stages have begun with that while the last one is at the loss; where none does, they wait.
        """
        asked = self.config.loss.stages
        if self.layout.pipeline == 1 or asked == "last":
            return False
        waiting = self.stash == self.plan.microbatches
        return asked == "all" or waiting and self.plan.global_batch >= LARGE_LOSS

    @property
    def run_dir(self) -> Path:
        return Path(self.config.run_dir)

    @property
    def tokenizer_choice(self) -> str | None:
        """What a checkpoint notes as `data.tokenizer`."""
        if self.tokenizer.folder is not None:
            return str(Path(self.tokenizer.folder).absolute())
        return self.config.data.tokenizer


def make_run_plan(config: Config, world_size: int) -> Job:
    """Check everything but the data. Reads files, writes none, starts nothing.

    Raises:
        InputError: whatever is wrong, with the way out.
    """
    parallel = config.parallel
    architecture = with_logit_defaults(load_architecture(config.model.name), config.loss.kind)
    check_model(parallel.tensor, architecture)  # before a world is asked for that cannot help
    layout = Layout(
        world_size,
        parallel.tensor,
        parallel.pipeline,
        parallel.virtual_pipeline,
        parallel.sequence,
    )
    stages = stages_of(config, architecture, layout)
    plan = plan_batch(layout, config.batch.global_, config.batch.micro)
    check_microbatches(layout, plan)
    stash = choose_stash(parallel, plan.microbatches)
    resume = find_resume_point(config, architecture)
    facts, initial = initial_weights_source(config, architecture, resume)

    chosen = {
        key: getattr(config.data, key) for key in ("mean", "std", "interpolation", "resize_mode")
    }
    preprocess = Preprocess.from_openclip(
        architecture.vision.image_size, facts.preprocess if facts else None, chosen
    )
    tokenizer = build_tokenizer(
        config.data.tokenizer or (facts.tokenizer if facts else None),
        architecture.text,
        facts.folder if facts else None,
    )
    return Job(
        config, architecture, layout, plan, resume, preprocess, tokenizer, initial, stages, stash
    )


def model_options(config: Config, layout: Layout) -> ModelOptions:
    """How a config builds its model in `layout`; see `build_train_state`."""
    return ModelOptions(
        precision=config.precision,
        recompute=config.recompute,
        sequence=layout.sequence,
        deterministic=config.deterministic,
    )


def open_data(
    job: Job, say: Print, *, check: bool = True, counts_suffice: bool = False
) -> tuple[TrainingData, int]:
    """The training pairs, and the number of steps that the run has over them. The index of shards
    that have none is made and not kept; the rest is as in `index_shards`.

    Raises:
        InputError: no or broken shards, or a run shorter than one step or than its schedule.
    """
    config = job.config
    data = open_training_data(
        config,
        job.preprocess,
        job.tokenizer,
        say,
        check=check,
        save_index=False,
        counts_suffice=counts_suffice,
    )
    steps = training_steps(config.train, data.samples_per_epoch, config.batch.global_)
    schedule = config.schedule
    if schedule.kind == "wsd" and schedule.warmup + schedule.cooldown > steps:
        raise InputError(
            f"schedule.warmup {schedule.warmup} + schedule.cooldown {schedule.cooldown} are more "
            f"than the run's {steps} steps; shorten one, or train longer"
        )
    return data, steps


def check_data(
    job: Job, say: Print, *, counts_suffice: bool = False
) -> tuple[int, list[ShardTable]]:
    """Look into the training and the held-out shards. Writes nothing: the index of the shards that
    are returned is still to be kept. Also returns the number of steps.

    Raises:
        InputError: as `open_data` and `check_held_out`, or shards that are of another kind.
    """
    data, steps = open_data(job, say, counts_suffice=counts_suffice)
    if job.resume.step < steps:  # else there is nothing to go on with
        _require_same_data(job.resume, data.data_fingerprint)
    for source, shards in zip(job.config.data.train, data.sources, strict=True):
        check_first_samples(shards, "captions", source.caption_key or job.config.data.caption_key)
    return steps, [*data.sources, *check_held_out(job.config, say)]


def initial_weights_source(
    config: Config, architecture: Architecture, resume: ResumePoint
) -> tuple[SourceMetadata | None, ModelWeights | None]:
    """Where preprocessing, tokenizer and weights come from: the checkpoint that the run goes on
    from, else `init.from`, else nowhere (random weights)."""
    if resume.checkpoint is not None:
        return open_source(resume.checkpoint).metadata, None
    if config.init.from_ is None:
        return None, None
    source = open_source(config.init.from_)
    # A model trained with InfoNCE has no bias: one that goes on with sigmoid begins with ours.
    return source.metadata, ModelWeights(source, architecture, optional=("logit_bias",))
