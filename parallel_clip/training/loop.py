"""`parallel-clip train`: from a config to a trained run folder."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from parallel_clip.checkpoint.checkpointer import save_checkpoint
from parallel_clip.checkpoint.load import load_checkpoint
from parallel_clip.checkpoint.meta import Meta
from parallel_clip.data.feeding.loader import RankBatchSlice, TrainingLoader
from parallel_clip.data.index.shard_table import ShardTable, save_index
from parallel_clip.engine import device
from parallel_clip.engine.groups import Groups, open_groups
from parallel_clip.engine.launch import Launch
from parallel_clip.evaluate.encoder import ModelEncoder
from parallel_clip.evaluate.held_out import HeldOutEvaluation
from parallel_clip.model.initialize import initial_value
from parallel_clip.model.megatron_config import DTYPES
from parallel_clip.model.parameters import local_slice
from parallel_clip.optimizer.train_state import TrainState, build_train_state
from parallel_clip.plan.describe import describe_data, describe_job
from parallel_clip.plan.run_plan import Job, check_data, open_data
from parallel_clip.training import run_folder
from parallel_clip.training.feed import DeviceFeed, StepBatch
from parallel_clip.training.learning_rate import learning_rate
from parallel_clip.training.run_log import MetricsLog, StepRecord, StepTimer
from parallel_clip.training.sample_log import SampleLog
from parallel_clip.training.step import TrainStep, build_loss


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
    built = build_train_state(config, job.architecture, groups)
    groups.run_on_all_ranks(lambda: _set_weights(built, job, groups))

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
    _Run(job, groups, built, held_out, steps, data.data_fingerprint).run(feed)
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
        data_fingerprint: dict[str, Any],
    ):
        self.job = job
        self.config = job.config
        self.groups = groups
        self.built = built
        self.held_out = held_out
        self.steps = steps
        self.data_fingerprint = data_fingerprint
        self.samples = SampleLog(
            job.run_dir,
            groups,
            job.plan.global_batch,
            job.config.data.max_bad_fraction,
            job.resume.bad_samples,
            job.resume.source_samples or [0] * len(job.config.data.train),
        )
        self.stopwatch = StepTimer()
        self.log: MetricsLog | None = None
        if groups.is_rank_zero:
            self.log = MetricsLog(job.run_dir, steps, job.plan.global_batch, job.resume.step)

    def run(self, feed: DeviceFeed) -> None:
        config, settings = self.config, self.config.optimizer
        all_stages, wanted = self.job.loss_on_all_stages, config.loss
        loss = build_loss(wanted.kind, wanted.exchange, wanted.tile, self.groups, all_stages)
        train_step = TrainStep(self.built, loss, self.job.stash, self.groups.pipeline, all_stages)
        first = self.job.resume.step
        for step, (batch, data_seconds) in enumerate(
            _timed(feed.batches(first, self.steps)), start=first + 1
        ):
            self.samples.count(step, batch)
            lr = learning_rate(step - 1, self.steps, settings.lr, config.schedule)
            try:
                record = train_step(batch.inputs, lr)
            except FloatingPointError as error:
                raise FloatingPointError(f"step {step}: {error}") from None
            self.stopwatch.add_step(data_seconds)
            if config.log.ledger:
                self.samples.write_ledger(step, batch)
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
            samples = self.samples
            self.log.write_step(
                step, record, means, int(memory), samples.bad_samples, samples.source_samples
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
        job = self.job
        meta = Meta(
            step=step,
            position=step * job.plan.global_batch,
            bad_samples=self.samples.bad_samples,
            source_samples=tuple(self.samples.source_samples),
            data=self.data_fingerprint,
            model_name=job.architecture.name,
            model=job.architecture.json,
            preprocess=job.preprocess.to_openclip(),
            tokenizer=job.tokenizer_choice,
        )
        save_checkpoint(
            job.run_dir,
            meta,
            self.built.chunks,
            self.built.optimizer,
            self.groups,
            self.config.checkpoint.keep,
        )


def _set_weights(built: TrainState, job: Job, groups: Groups) -> None:
    """From the checkpoint to go on from, else from `init.from`, else random."""
    if job.resume.checkpoint is not None:
        load_checkpoint(job.resume.checkpoint, built.chunks, built.optimizer, groups)
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
