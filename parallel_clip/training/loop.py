"""Train a planned run: from its plan to a trained run folder."""

from __future__ import annotations

import time
from dataclasses import replace

import torch
import torch.distributed as dist

from parallel_clip.checkpoint.checkpointer import Checkpointer
from parallel_clip.checkpoint.meta import Meta
from parallel_clip.convert.open import open_initial_weights
from parallel_clip.data.feeding.loader import RankBatchSlice, TrainingLoader
from parallel_clip.data.feeding.open import (
    RunShards,
    build_held_out_data,
    build_training_data,
    reopen_run_shards,
)
from parallel_clip.data.feeding.training_data import TrainingData
from parallel_clip.data.storage.progress import Print, print_nothing
from parallel_clip.engine import device
from parallel_clip.engine.groups import Groups, join_world, make_groups
from parallel_clip.engine.launch import Launch
from parallel_clip.errors import InputError
from parallel_clip.evaluate.encoder import ModelEncoder
from parallel_clip.evaluate.held_out import HeldOutEvaluation
from parallel_clip.model.initialize import initial_value
from parallel_clip.model.megatron_config import DTYPES
from parallel_clip.model.parameters import local_slice
from parallel_clip.optimizer.train_state import TrainState
from parallel_clip.plan.build import build_planned_state
from parallel_clip.plan.describe import describe_data, describe_run
from parallel_clip.plan.run_plan import RunPlan
from parallel_clip.training.feed import DeviceFeed
from parallel_clip.training.learning_rate import learning_rate
from parallel_clip.training.run_folder import prepare_run_folder
from parallel_clip.training.run_log import RunLog, StepRecord, StepTimer
from parallel_clip.training.sample_log import SampleLog
from parallel_clip.training.step import TrainStep, build_loss


def train(plan: RunPlan, launch: Launch, shards: RunShards | None = None) -> None:
    """Run, or resume, a training. Called by every process with the same plan.

    shards: what rank 0 found when it made the plan; None: they are looked up.

    Raises:
        InputError: the input is wrong; nothing has been written.
        BadDataError: more of the samples are bad than `data.max_bad_fraction`.
    """
    print_ = print if launch.is_rank_zero else print_nothing
    if plan.is_finished:
        print_(f"{plan.run_dir} is finished: {plan.resume.step} of {plan.steps} steps done")
        return
    config = plan.config
    if config.deterministic:
        device.make_deterministic()
    join_world(launch)
    groups = make_groups(plan.layout)
    state = build_planned_state(config, plan.architecture, plan.layout_plan, groups)
    checkpointer = Checkpointer(plan.run_dir, groups, config.checkpoint.keep)
    groups.run_on_all_ranks(lambda: _set_weights(state, plan, checkpointer, groups))
    # Nothing before this writes anything.
    groups.run_on_rank_zero(lambda: _write_first_files(plan, shards, print_))
    shards = groups.run_on_all_ranks(lambda: shards or _find_planned_shards(plan, groups))
    tokenizer = plan.tokenizer.build(plan.architecture.text)
    held_out = HeldOutEvaluation(
        build_held_out_data(
            config, shards, plan.preprocess, tokenizer, groups.data_rank, plan.layout.data
        ),
        plan.prompts,
        ModelEncoder(state.chunks, plan.preprocess, tokenizer, groups),
        groups,
        loss_kind=config.loss.kind,
        batch=config.evaluate.batch,
    )
    data = build_training_data(config, shards, plan.preprocess, tokenizer)
    print_(describe_run(plan))
    print_(describe_data(plan))
    feed = DeviceFeed(
        _loader(plan, data, groups) if groups.reads_data else None,
        plan.architecture,
        plan.batch,
        groups,
        DTYPES[config.precision],
        config.seed,
    )
    TrainingLoop(plan, groups, state, checkpointer, held_out).run(feed)
    print_(f"finished: {plan.steps} steps, {plan.run_dir}")


class TrainingLoop:
    """The loop over steps, and what happens between them: metrics, checkpoints, evaluations."""

    def __init__(
        self,
        plan: RunPlan,
        groups: Groups,
        state: TrainState,
        checkpointer: Checkpointer,
        held_out: HeldOutEvaluation,
    ):
        self.plan = plan
        self.config = plan.config
        self.groups = groups
        self.state = state
        self.checkpointer = checkpointer
        self.held_out = held_out
        layout_plan = plan.layout_plan
        on_all_stages = layout_plan.loss_on_all_stages
        loss = build_loss(plan.config.loss, groups, on_all_stages)
        self.step = TrainStep(state, loss, layout_plan.stash, groups.pipeline, on_all_stages)
        self.timer = StepTimer()
        self.log: RunLog | None = None
        if groups.is_rank_zero:
            self.log = RunLog(plan.run_dir, plan.steps, plan.batch.global_batch, plan.resume.step)
        self.samples = SampleLog(
            plan.run_dir,
            groups,
            plan.batch.global_batch,
            plan.config.data.max_bad_fraction,
            plan.resume.bad_samples,
            list(plan.resume.source_samples) or [0] * len(plan.epoch_pairs),
        )

    def run(self, feed: DeviceFeed) -> None:
        """Train from the step resumed from to the last one."""
        settings, first = self.config.optimizer, self.plan.resume.step
        batches = feed.batches(first, self.plan.steps)
        for step in range(first + 1, self.plan.steps + 1):
            began = time.perf_counter()
            batch = next(batches)
            self.timer.add_step(data_seconds=time.perf_counter() - began)
            self.samples.count(step, batch)
            lr = learning_rate(step - 1, self.plan.steps, settings.lr, self.config.schedule)
            try:
                record = self.step(batch.inputs, lr)
            except FloatingPointError as error:
                raise FloatingPointError(f"step {step}: {error}") from None
            if self.config.log.ledger:
                self.samples.write_ledger(step, batch)
            if step == 1 or step % self.config.log.every == 0:
                self._write_metrics(step, record)
            self.save_and_evaluate(step)
        if self.log is not None:
            self.log.close()

    def _write_metrics(self, step: int, record: StepRecord) -> None:
        memory = torch.tensor(device.peak_memory_bytes(), device=self.groups.device)
        dist.all_reduce(memory, op=dist.ReduceOp.MAX)
        means = self.timer.means(self.plan.batch.global_batch)
        self.timer = StepTimer()
        if self.log is not None:
            bad, of_sources = self.samples.bad_samples, self.samples.source_samples
            self.log.write_step(step, record, means, int(memory), bad, of_sources)

    def save_and_evaluate(self, step: int) -> None:
        """Save and evaluate where the config asks for it after `step`, and after the last one."""
        began = time.perf_counter()
        last = step == self.plan.steps
        evaluate, checkpoint = self.config.evaluate.every, self.config.checkpoint.every
        # Saved first: held-out shards that turn out to be bad must not cost the training.
        if (checkpoint and step % checkpoint == 0) or last:
            self.checkpointer.save(self._meta(step), self.state)
        if evaluate and (step % evaluate == 0 or last):
            results = self.held_out.evaluate()
            if self.log is not None:
                self.log.write_evaluation(step, results)
        self.timer.leave_out(time.perf_counter() - began)

    def _meta(self, step: int) -> Meta:
        plan = self.plan
        model = Meta.of_model(plan.architecture, plan.preprocess.to_openclip(), plan.tokenizer_name)
        return replace(
            model,
            step=step,
            position=step * plan.batch.global_batch,
            bad_samples=self.samples.bad_samples,
            source_samples=tuple(self.samples.source_samples),
            data=plan.data_fingerprint,
        )


def _write_first_files(plan: RunPlan, shards: RunShards | None, print_: Print) -> None:
    prepare_run_folder(plan.config, plan.layout, device.describe_device(), plan.resume.step)
    if shards is not None:
        shards.save_index(print_)


def _find_planned_shards(plan: RunPlan, groups: Groups) -> RunShards:
    """The shards of the run as this rank sees them.

    Raises:
        InputError: they are not those of the plan, as where this node sees another state of a
            shared file system than rank 0.
    """
    shards = reopen_run_shards(plan.config)
    if shards.fingerprint != plan.data_fingerprint:
        raise InputError(
            f"rank {groups.rank} on {device.host_name()} sees other training shards than rank 0; "
            "see that data.train names the same files on every node, or make their index first: "
            "parallel-clip data index"
        )
    return shards


def _loader(plan: RunPlan, data: TrainingData, groups: Groups) -> TrainingLoader:
    batch, settings = plan.batch, plan.config.data
    return TrainingLoader(
        data,
        RankBatchSlice(batch.global_batch, batch.micro_batch, groups.data_rank, plan.layout.data),
        plan.resume.step,
        plan.steps,
        workers=settings.workers,
        prefetch=settings.prefetch,
        patience=settings.worker_patience,
        pin_memory=groups.device.type == "cuda",
    )


def _set_weights(
    state: TrainState, plan: RunPlan, checkpointer: Checkpointer, groups: Groups
) -> None:
    """From the checkpoint to resume, else from `init.from`, else random."""
    if plan.resume.checkpoint is not None:
        checkpointer.load(plan.resume.checkpoint, state)
        return
    initial = open_initial_weights(plan.config.init.from_, plan.architecture)
    rank, size = groups.tensor_rank, groups.layout.tensor
    for parameter, tensor in state.global_parameters():
        whole = initial.read(parameter.name) if initial is not None else None
        if whole is None:
            whole = initial_value(parameter, plan.config.seed)
        part = local_slice(whole.float(), parameter.placement, rank, size)
        state.optimizer.set_weight(tensor, part)
