"""`parallel-clip train`: from a config to a trained run folder."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.distributed as dist

from parallel_clip.checkpoint.checkpointer import Checkpointer
from parallel_clip.checkpoint.meta import Meta
from parallel_clip.data.feeding.loader import RankBatchSlice, TrainingLoader
from parallel_clip.data.index.shard_table import ShardTable, save_index
from parallel_clip.engine import device
from parallel_clip.engine.groups import Groups, open_groups
from parallel_clip.engine.launch import Launch
from parallel_clip.errors import BadDataError
from parallel_clip.evaluate.encoder import ModelEncoder
from parallel_clip.evaluate.held_out import HeldOutEvaluation
from parallel_clip.model.initialize import initial_value
from parallel_clip.model.megatron_config import DTYPES
from parallel_clip.model.parameters import local_slice
from parallel_clip.optimizer.train_state import TrainState, build_train_state
from parallel_clip.plan.describe import describe_data, describe_job
from parallel_clip.plan.run_plan import Job, check_data, model_options, open_data
from parallel_clip.training import run_folder
from parallel_clip.training.feed import DeviceFeed, StepBatch
from parallel_clip.training.learning_rate import learning_rate
from parallel_clip.training.run_log import MetricsLog, StepRecord, StepTimer
from parallel_clip.training.sample_log import _Ledger
from parallel_clip.training.step import build_loss, training_step


def train(job: Job, launch: Launch) -> None:
    """Run, or go on with, a training. Called by every process.

    Raises:
        InputError: the input is wrong; nothing has been written.
        BadDataError: more of the samples are bad than `data.max_bad_fraction`.
    """
    config = job.config
    if config.deterministic:
        device.make_deterministic()
    groups = open_groups(job.layout, launch)
    say = print if groups.is_rank_zero else _say_nothing
    shards: list[ShardTable] = []  # on rank 0, whose index is still to be kept

    def look_into_data() -> int:
        steps, found = check_data(job, say)
        shards.extend(found)
        return steps

    steps = groups.run_on_rank_zero(look_into_data)
    if job.resume.step >= steps:
        say(f"{job.run_dir} is finished: {job.resume.step} of {steps} steps done")
        return
    built = build_train_state(
        job.architecture,
        model_options(config, job.layout),
        job.stages,
        groups,
        config.optimizer,
        config.parallel.distributed_optimizer,
    )
    checkpointer = Checkpointer(job.run_dir, groups, config.checkpoint.keep)
    groups.run_on_all_ranks(lambda: _set_weights(built, job, groups, checkpointer))

    def write_first_files() -> None:  # nothing before this writes anything
        run_folder.prepare_run_folder(config, job.layout, device.describe_device(), job.resume)
        for table in shards:
            save_index(table, say)

    groups.run_on_rank_zero(write_first_files)
    data, _ = groups.run_on_all_ranks(lambda: open_data(job, _say_nothing, check=False))
    encoder = ModelEncoder(built.chunks, job.preprocess, job.tokenizer, groups)
    held_out = groups.run_on_all_ranks(
        lambda: HeldOutEvaluation(config, encoder, groups, _say_nothing)
    )
    say(describe_job(job, steps))
    say(describe_data(job, data))

    loader = None
    if groups.reads_data:
        part = RankBatchSlice(
            job.plan.global_batch, job.plan.micro_batch, groups.data_rank, job.layout.data
        )
        loader = TrainingLoader(
            data,
            part,
            job.resume.step,
            steps,
            workers=config.data.workers,
            prefetch=config.data.prefetch,
            patience=config.data.worker_patience,
        )
    feed = DeviceFeed(
        loader, job.architecture, job.plan, groups, DTYPES[config.precision], config.seed
    )
    meta = Meta.of_model(job.architecture, job.preprocess.to_openclip(), job.tokenizer_choice)
    meta = replace(meta, data=data.data_fingerprint)
    _Run(job, groups, built, held_out, steps, checkpointer, meta).run(feed)
    say(f"finished: {steps} steps, {job.run_dir}")


class _Run:
    """The loop over steps and what happens between them."""

    def __init__(
        self,
        job: Job,
        groups: Groups,
        built: TrainState,
        held_out: HeldOutEvaluation,
        steps: int,
        checkpointer: Checkpointer,
        meta: Meta,
    ):
        self.job = job
        self.config = job.config
        self.groups = groups
        self.built = built
        self.held_out = held_out
        self.steps = steps
        self.checkpointer = checkpointer
        self.meta = meta  # of the checkpoints to come, but for how far the run has come
        self.bad_samples = job.resume.bad_samples
        seen = job.resume.source_samples or [0] * len(job.config.data.train)
        self.source_samples = torch.tensor(seen)
        self.stopwatch = StepTimer()
        self.log: MetricsLog | None = None
        if groups.is_rank_zero:
            self.log = MetricsLog(job.run_dir, steps, job.plan.global_batch, job.resume.step)
        self.ledger = _Ledger(job, groups) if self.config.log.ledger else None

    def run(self, feed: DeviceFeed) -> None:
        config, settings = self.config, self.config.optimizer
        loss = build_loss(config, self.groups, self.job.loss_on_all_stages)
        first = self.job.resume.step
        for step, (batch, data_seconds) in enumerate(
            _timed(feed.batches(first, self.steps)), start=first + 1
        ):
            self._account_for_samples(step, batch)
            lr = learning_rate(step - 1, self.steps, settings.lr, config.schedule)
            try:
                record = training_step(
                    self.built,
                    loss,
                    batch.inputs,
                    self.job.stash,
                    lr,
                    self.groups.pipeline,
                    self.job.loss_on_all_stages,
                )
            except FloatingPointError as error:
                raise FloatingPointError(f"step {step}: {error}") from None
            self.stopwatch.add_step(data_seconds)
            if self.ledger is not None:
                self.ledger.write(step, batch)
            if step == 1 or step % config.log.every == 0:
                self._write_metrics(step, record)
            self.save_and_evaluate(step)
        if self.log is not None:
            self.log.close()

    def _write_metrics(self, step: int, record: StepRecord) -> None:
        memory = torch.tensor(device.peak_memory_bytes(), device=self.groups.device)
        dist.all_reduce(memory, op=dist.ReduceOp.MAX)
        means = self.stopwatch.read(self.job.plan.global_batch)
        if self.log is not None:
            self.log.write_step(
                step, record, means, int(memory), self.bad_samples, self.source_samples.tolist()
            )

    def save_and_evaluate(self, step: int) -> None:
        began = time.perf_counter()
        last = step == self.steps
        evaluate, checkpoint = self.config.evaluate.every, self.config.checkpoint.every
        # Saved first: held-out shards that turn out to be bad must not cost the training.
        if (checkpoint and step % checkpoint == 0) or last:
            self._save(step)
        if evaluate and (step % evaluate == 0 or last):
            results = self.held_out.evaluate()
            if self.log is not None:
                self.log.write_evaluation(step, results)
        self.stopwatch.leave_out(time.perf_counter() - began)

    def _save(self, step: int) -> None:
        meta = replace(
            self.meta,
            step=step,
            position=step * self.job.plan.global_batch,
            bad_samples=self.bad_samples,
            source_samples=tuple(self.source_samples.tolist()),
        )
        self.checkpointer.save(meta, self.built)

    def _account_for_samples(self, step: int, batch: StepBatch) -> None:
        """Count over all ranks those of each source, and the bad ones, which are listed in the run
        folder and end the run when they are too many."""
        sources = len(self.source_samples)
        found = torch.tensor([len(batch.bad), *batch.of_sources(sources)])
        found = found.to(self.groups.device)
        dist.all_reduce(found)
        bad_ones, *of_sources = found.tolist()
        self.source_samples += torch.tensor(of_sources)
        if not bad_ones:
            return
        bad: list = [None] * self.job.layout.world
        dist.all_gather_object(bad, [sample._asdict() for sample in batch.bad])
        samples = [sample for of_rank in bad for sample in of_rank]
        self.bad_samples += len(samples)
        if self.log is not None:
            self.log.write_bad_samples(step, samples)
        seen = step * self.job.plan.global_batch
        limit = self.config.data.max_bad_fraction
        if self.bad_samples > limit * seen:
            worst = samples[0]
            raise BadDataError(
                f"{self.bad_samples} of the {seen} samples seen by step {step} are bad, more than "
                f"data.max_bad_fraction {limit:g} allows; the first of this step: "
                f"{worst['key']} of {worst['shard']}: {worst['reason']}. All are listed in "
                f"{self.job.run_dir / run_folder.BAD_SAMPLES_FILE}; `parallel-clip data check` "
                "finds the rest"
            )


def _set_weights(built: TrainState, job: Job, groups: Groups, checkpointer: Checkpointer) -> None:
    """From the checkpoint to go on from, else from `init.from`, else random."""
    if job.resume.checkpoint is not None:
        checkpointer.load(job.resume.checkpoint, built)
        return
    rank, size = groups.tensor_rank, groups.layout.tensor
    for parameter, tensor in built.global_parameters():
        whole = job.initial.read(parameter.name) if job.initial is not None else None
        if whole is None:
            whole = initial_value(parameter, job.architecture, job.config.seed)
        part = local_slice(whole.float(), parameter.placement, rank, size)
        built.optimizer.set_weight(tensor, part)


def _timed(batches: Iterator[StepBatch]) -> Iterator[tuple[StepBatch, float]]:
    """Each batch with the seconds that it was waited for."""
    while True:
        began = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            return
        yield batch, time.perf_counter() - began


def _say_nothing(_: str) -> None:
    pass
