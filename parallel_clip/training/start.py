"""How a job starts: rank 0 plans and takes the run folder, then all ranks compare what they see."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from parallel_clip.checkpoint import commit, durable
from parallel_clip.checkpoint.checkpointer import Checkpointer
from parallel_clip.checkpoint.manifest import MANIFEST_FILE
from parallel_clip.checkpoint.meta import Meta
from parallel_clip.config import Config
from parallel_clip.data.feeding.run_shards import RunShards, reopen_run_shards
from parallel_clip.data.index.shard_list import describe_differences
from parallel_clip.data.storage.progress import print_nothing
from parallel_clip.engine.collectives import gather_objects
from parallel_clip.engine.device import host_name
from parallel_clip.engine.groups import Groups
from parallel_clip.engine.versions import versions
from parallel_clip.errors import InputError
from parallel_clip.plan.memory_limit import Machine, ranks_on_machine
from parallel_clip.plan.resume import ResumePoint, fall_back, find_resume_point
from parallel_clip.plan.run_plan import RunPlan, make_run_plan
from parallel_clip.training.lease import SEEN_SECONDS, Lease, LeaseToken, take_lease


def plan_and_take_lease(
    config: Config, world_size: int, local_size: int | None = None
) -> tuple[tuple[RunPlan, LeaseToken | None], tuple[RunShards, Lease | None]]:
    """On rank 0: the plan and the lease's token for all ranks; the shards and the lease for itself.
    local_size: ranks on a machine, None: not known.

    Nothing is written before everything else has been checked. A finished run takes no lease.

    Raises:
        InputError: whatever is wrong, with the way out; nothing is left behind.
    """
    machine = Machine(ranks_on_machine(world_size, local_size))
    plan, shards = make_run_plan(config, world_size, machine=machine)
    if plan.is_finished:
        return (plan, None), (shards, None)
    lease = take_lease(plan.run_dir)
    try:
        for line in commit.clean(plan.run_dir):
            print(line)
        # Until the lease was taken another job may have written a checkpoint.
        if find_resume_point(config, say=lambda _: None) != plan.resume:
            plan, shards = make_run_plan(config, world_size, machine=machine)
    except BaseException:
        lease.release()
        raise
    return (plan, lease.token), (shards, lease)


def check_same_view(plan: RunPlan, token: LeaseToken | None, groups: Groups) -> None:
    """See that this rank's machine has the plan's files and versions.

    Raises:
        InputError: it has others, or sees an older state of a shared file system.
    """
    where = f"rank {groups.rank} on {host_name()}"
    if token is not None and not token.wait_until_seen():
        raise InputError(
            f"{where} does not see the run folder {plan.run_dir} in which rank 0 writes; run_dir "
            "has to be on a file system that all machines share, and paths start from the working "
            "directory"
        )
    resume = plan.resume
    if resume.checkpoint is not None:
        try:
            found = durable.hash_file(resume.checkpoint / MANIFEST_FILE).hash
        except OSError:
            found = None
        if found != resume.manifest_hash:
            raise InputError(
                f"{where} {'does not see' if found is None else 'sees another'} checkpoint "
                f"{resume.checkpoint} than rank 0: its file system shows an older state. Start "
                "again once that has passed, or leave that machine out"
            )
    differing = [
        f"{package} {own} (rank 0 has {plan.versions.get(package)})"
        for package, own in versions().items()
        if own != plan.versions.get(package)
    ]
    if differing:
        raise InputError(
            f"{where} has other versions: {', '.join(differing)}; install the same on every machine"
        )


def open_planned_shards(
    plan: RunPlan,
    groups: Groups,
    first_on_machine: bool,
    own: RunShards | None,
    say: Callable[[str], None],
) -> RunShards:
    """The shards of the run as this rank sees them, once all ranks see the same.

    own: what rank 0 found when it planned; its index is saved first. first_on_machine: whether this
    rank checks the shards for its machine, and keeps the index of those that had none.

    Raises:
        InputError: a machine has other shards than rank 0, which are named; on every rank.
    """
    where, found = f"rank {groups.rank} on {host_name()}", own

    def open_in_turn(first: bool) -> None:
        nonlocal found
        if found is not None or first != first_on_machine:
            return
        try:
            found = reopen_run_shards(plan.config, plan.left_out, check=first)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        if first:
            found.save_index(print_nothing)

    # In this order: each finds what those before it have scanned and saved.
    groups.run_on_all_ranks(lambda: own.save_index(say) if own is not None else None)
    for first in (True, False):
        groups.run_on_all_ranks(partial(open_in_turn, first))
    same = found.fingerprint == plan.data_fingerprint
    if all(gather_objects(same, groups.world if groups.layout.world > 1 else None)):
        return found
    listed = groups.run_on_rank_zero(lambda: found.listed)

    def complain() -> None:
        if same:
            return
        if found.listed != listed:
            what = f"training shards than rank 0: {describe_differences(listed, found.listed)}"
        else:
            own, others = found.fingerprint["held_out"], plan.data_fingerprint["held_out"]
            names = [f"evaluate.{name}" for name in own if own[name] != others[name]]
            what = f"shards of {', '.join(names) or 'data.train'} than rank 0"
        raise InputError(
            f"{where} has other {what}; bring the same files to every machine, or put them on a "
            "file system that all share"
        )

    groups.run_on_all_ranks(complain)
    raise AssertionError("a rank that differs has said so")


def verify_checkpoint(
    plan: RunPlan, checkpointer: Checkpointer, groups: Groups, say: Callable[[str], None]
) -> RunPlan:
    """Hash the checkpoint to resume from, each file on one rank; with `checkpoint.fallback`, the
    one before where it is damaged. Returns the plan with what is resumed from.

    Raises:
        InputError: it is damaged, and there is none to fall back on.
    """
    while plan.config.checkpoint.verify and plan.resume.checkpoint is not None:
        try:
            checkpointer.verify(plan.resume.checkpoint)
            break
        except InputError as error:
            fall_back(plan.config, error, say)
        before = groups.run_on_rank_zero(partial(_resume_point_before, plan, say))
        plan = replace(plan, resume=before)
    return plan


def reached_resume_point(plan: RunPlan, groups: Groups) -> ResumePoint:
    """The checkpoint of `plan.stop`, which this job has just written: what the next model is loaded
    from.

    Raises:
        InputError: a machine does not see it; on every rank.
    """
    folder = commit.step_folder(plan.run_dir, plan.stop)

    def wait_until_seen() -> Meta:
        deadline = time.monotonic() + SEEN_SECONDS
        while not (folder / MANIFEST_FILE).is_file():
            if time.monotonic() > deadline:
                raise InputError(
                    f"rank {groups.rank} on {host_name()} does not see {folder}, which rank 0 has "
                    "written: its file system shows an older state. The same command goes on from "
                    "there"
                )
            time.sleep(0.1)
        return Meta.read(folder)

    meta = groups.run_on_all_ranks(wait_until_seen)
    return ResumePoint(folder, meta, is_evaluated=True)


def _resume_point_before(plan: RunPlan, say: Callable[[str], None]) -> ResumePoint:
    return find_resume_point(plan.config, before=plan.resume.step, say=say)
