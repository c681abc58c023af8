"""Train a planned run: from its plan to a trained run folder."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from parallel_clip.checkpoint.checkpointer import Checkpointer
from parallel_clip.config import parse_seconds
from parallel_clip.convert.initial_weights import InitialReader
from parallel_clip.data.feeding.loader import RankBatchSlice, TrainingLoader
from parallel_clip.data.feeding.open import build_held_out_data, build_training_data
from parallel_clip.data.feeding.run_shards import RunShards
from parallel_clip.data.feeding.training_data import TrainingData
from parallel_clip.data.samples.tokenizer import Tokenizer
from parallel_clip.data.samples.tokenizer_files import TokenizerFiles
from parallel_clip.data.storage.progress import print_nothing
from parallel_clip.engine import device
from parallel_clip.engine.groups import Groups, join_world, make_groups
from parallel_clip.engine.launch import Launch
from parallel_clip.engine.rendezvous import job_store
from parallel_clip.evaluate.encoder import ModelEncoder
from parallel_clip.evaluate.held_out import HeldOutEvaluation
from parallel_clip.model.initialize import initial_value
from parallel_clip.model.megatron_config import DTYPES
from parallel_clip.model.parameters import local_slice
from parallel_clip.optimizer.train_state import TrainState
from parallel_clip.plan.build import build_planned_state
from parallel_clip.plan.describe import describe_data, describe_reading, describe_run
from parallel_clip.plan.describe_segments import segment_words
from parallel_clip.plan.memory_limit import ranks_on_machine
from parallel_clip.plan.run_plan import RunPlan
from parallel_clip.training.feed import DeviceFeed
from parallel_clip.training.lease import Lease, LeaseToken
from parallel_clip.training.loop import TrainingLoop
from parallel_clip.training.run_folder import prepare_run_folder
from parallel_clip.training.start import (
    check_same_view,
    open_planned_shards,
    reached_resume_point,
    verify_checkpoint,
)
from parallel_clip.training.status import write_failure, write_status
from parallel_clip.training.stop import StopRequests
from parallel_clip.training.watchdog import Progress, Watchdog

# A collective that waits longer than the watchdog does ends with torch's own message.
_BEHIND_WATCHDOG = datetime.timedelta(minutes=10)


def train(
    plan: RunPlan,
    launch: Launch,
    shards: RunShards | None = None,
    lease: Lease | None = None,
    token: LeaseToken | None = None,
    requests: StopRequests | None = None,
) -> None:
    """Run, or resume, a training. Called by every process with the same plan.

    shards and lease: what rank 0 found and took when it made the plan; without shards they are
    looked up. token: of the lease. requests: the signals that this process has had.

    Raises:
        InputError: the input is wrong; nothing has been written.
        BadDataError: more of the samples are bad than `data.max_bad_fraction`.
        BadStepsError, SaveFailedError: as `bad_steps` and `checkpoint.failures` say.
    """
    if plan.is_finished:
        if launch.is_rank_zero:
            print(f"{plan.run_dir} is finished: {plan.resume.step} of {plan.steps} steps done")
        return
    if plan.config.deterministic:
        device.make_deterministic()
    timeout = datetime.timedelta(seconds=plan.config.watchdog.timeout)
    join_world(launch, timeout + _BEHIND_WATCHDOG)
    groups = make_groups(plan.layout)
    requests = requests or StopRequests()
    requests.time_limit = _time_limit(plan)
    progress = Progress()
    watchdog = Watchdog(
        progress,
        plan.config.watchdog.timeout,
        launch.rank,
        launch.world_size,
        job_store(launch) if launch.world_size > 1 else None,
        plan.run_dir,
        lambda message: write_status(
            plan.run_dir, "failed", progress.step, f"watchdog: {message.splitlines()[0]}"
        ),
    )
    watchdog.start()
    try:
        job, plan = _prepare(plan, launch, groups, lease, token, requests, progress)
        _train_segments(plan, job, launch, shards)
    finally:
        watchdog.stop()


@dataclass(frozen=True)
class _Job:
    """What stays while the model of a run changes from segment to segment."""

    groups: Groups
    tokenizer: Tokenizer
    checkpointer: Checkpointer
    requests: StopRequests
    progress: Progress
    token: LeaseToken | None
    say: Callable[[str], None]


def _prepare(
    plan: RunPlan,
    launch: Launch,
    groups: Groups,
    lease: Lease | None,
    token: LeaseToken | None,
    requests: StopRequests,
    progress: Progress,
) -> tuple[_Job, RunPlan]:
    """See that all ranks see the same; the plan, with another checkpoint where the newest is
    damaged. Arguments as those of `train`."""
    say = print if groups.is_rank_zero else print_nothing
    groups.run_on_all_ranks(lambda: check_same_view(plan, token, groups))
    tokenizer = groups.run_on_all_ranks(lambda: plan.tokenizer.build(plan.architecture.text))
    checkpoint = plan.config.checkpoint
    checkpointer = Checkpointer(
        plan.run_dir,
        groups,
        checkpoint.keep,
        asynchronous=checkpoint.async_,
        failures=checkpoint.failures,
        files=groups.run_on_all_ranks(lambda: _tokenizer_files(tokenizer, groups)),
        may_write=lease.check if lease is not None else lambda: None,
        tick=progress.mark_again,
    )
    plan = verify_checkpoint(plan, checkpointer, groups, say)
    return _Job(groups, tokenizer, checkpointer, requests, progress, token, say), plan


def _train_segments(plan: RunPlan, job: _Job, launch: Launch, shards: RunShards | None) -> None:
    """Train with one model after the other, each loaded from what the one before has saved: a run
    that is resumed there goes the same way."""
    groups = job.groups
    state = _build_state(plan, job)
    shards = open_planned_shards(plan, groups, launch.local_rank == 0, shards, job.say)
    # Nothing before this writes anything but the lease and the index of the shards.
    groups.run_on_rank_zero(
        lambda: prepare_run_folder(plan, device.describe_device(), shards.listed)
    )
    job.say(describe_run(plan))
    job.say(describe_data(plan))
    per_machine = ranks_on_machine(launch.world_size, launch.local_size)
    job.say("\n".join(describe_reading(plan, per_machine)))
    while _train_segment(plan, job, shards, state):
        reached = plan.stop
        job.progress.mark("building the model of the next phase", reached)
        del state
        device.release_memory()
        try:
            plan = replace(plan, resume=reached_resume_point(plan, groups))
            if plan.config.checkpoint.verify:
                job.checkpointer.verify(plan.resume.checkpoint)
            state = _build_state(plan, job)
        except BaseException as error:
            if job.token is None or job.token.is_seen():  # else the folder is another job's
                write_failure(plan.run_dir, reached, error)
            raise
        job.say(f"from step {plan.resume.step + 1} on: {segment_words(plan.current)}")


def _build_state(plan: RunPlan, job: _Job) -> TrainState:
    config = plan.current.segment.config_of(plan.config)
    state = build_planned_state(
        config, plan.architecture, plan.layout_plan, job.groups, plan.trained_since
    )
    tick = job.progress.mark_again
    job.groups.run_on_all_ranks(
        lambda: _set_weights(state, plan, job.checkpointer, job.groups, tick)
    )
    return state


def _train_segment(plan: RunPlan, job: _Job, shards: RunShards, state: TrainState) -> bool:
    """Train with one model. Whether the run goes on, with another one."""
    config, groups, tokenizer = plan.config, job.groups, job.tokenizer
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
    data = build_training_data(config, shards, plan.preprocess, tokenizer, plan.stretches)
    feed = DeviceFeed(
        _loader(plan, data, groups) if groups.reads_data else None,
        plan.architecture,
        plan.batch,
        groups,
        DTYPES[config.precision],
        config.seed,
        plan.preprocess if config.data.normalize == "device" else None,
        identities=config.loss.duplicates != "none",
    )
    loop = TrainingLoop(
        plan, groups, state, job.checkpointer, held_out, job.requests, job.progress, job.token
    )
    return loop.run(feed)


def _time_limit(plan: RunPlan) -> float | None:
    limit = plan.config.train.time_limit
    return None if limit is None else parse_seconds(limit, "train.time_limit")


def _tokenizer_files(tokenizer: Tokenizer, groups: Groups) -> Mapping[str, bytes]:
    """What rank 0 writes into each checkpoint; read once, as the folder may be gone later."""
    if tokenizer.path is None or not groups.is_rank_zero:
        return {}
    return TokenizerFiles.read(tokenizer.path).files


def _loader(plan: RunPlan, data: TrainingData, groups: Groups) -> TrainingLoader:
    batch, settings = plan.batch, plan.config.data
    return TrainingLoader(
        data,
        RankBatchSlice(batch.global_batch, batch.micro_batch, groups.data_rank, plan.layout.data),
        plan.resume.step,
        plan.stop,
        workers=settings.workers,
        prefetch=settings.prefetch,
        patience=settings.worker_patience,
        pin_memory=groups.device.type == "cuda",
    )


def _set_weights(
    state: TrainState,
    plan: RunPlan,
    checkpointer: Checkpointer,
    groups: Groups,
    tick: Callable[[], None],
) -> None:
    """From the checkpoint to resume, else by `init.*`, else random. tick: called at each
    tensor, to show that this goes on."""
    if plan.resume.checkpoint is not None:
        checkpointer.load(plan.resume.checkpoint, state)
        return
    initial = None
    if plan.initial is not None:
        initial = InitialReader(plan.initial, plan.architecture)
    rank, size = groups.tensor_rank, groups.layout.tensor
    for parameter, tensor in state.global_parameters():
        tick()
        given = plan.logits.value(parameter.name)
        whole = torch.tensor(given) if given is not None else None
        if whole is None and initial is not None:
            whole = initial.read(parameter.name)
        if whole is None:
            whole = initial_value(parameter, plan.config.seed)
        part = local_slice(whole.float(), parameter.placement, rank, size)
        state.set_weight(tensor, part)
    if state.average is not None:
        state.average.start()
