"""Keys that stand in several places of a shard: why, where it is so for many of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from parallel_clip.data.storage.tar import printable

_FEW_KEYS = 10  # that stand in several places are single mistakes, each a bad sample
_FEW_RUNS = 0.1  # of all runs


@dataclass(slots=True)
class Run:
    """Neighbouring files of one key: a sample."""

    begin: int  # in bytes
    key: str
    first: Run | None  # the first run of the same key, if this is another
    extensions: list[str] = field(default_factory=list)


def find_disorder(runs: Sequence[Run]) -> tuple[str, str] | None:
    """What is wrong with a shard in which many keys have several runs, and what to do; else None.

    A later run that brings kinds of files which the earlier ones lack is the rest of their sample:
    the files are not sorted. Otherwise it is another sample of the same key.
    """
    later = [run for run in runs if run.first is not None]
    keys = {run.key for run in later}
    if len(keys) <= _FEW_KEYS or len(later) < _FEW_RUNS * len(runs):
        return None
    seen: dict[str, set[str]] = {}
    rests = []
    for run in runs:
        known = seen.setdefault(run.key, set())
        if run.first is not None and not known.issuperset(run.extensions):
            rests.append(run)
        known.update(run.extensions)
    many = f"{len(keys):,} of {len(runs) - len(later):,} keys"
    if 2 * len(rests) > len(later):
        run = rests[0]
        return (
            f"its files are not sorted by sample: {many} stand in two places or more "
            f"({printable(run.key)} has {_kinds(run.first)}, {_kinds(run)})",
            "write it again with tar --sort=name",
        )
    run = later[0]
    return (
        f"its keys repeat: {many} stand in two places or more with files of the same kinds "
        f"({printable(run.key)} has {_kinds(run.first)}, {_kinds(run)}), as where shards with the "
        "same keys were joined",
        "leave them apart, or give their samples different keys",
    )


def _kinds(run: Run) -> str:
    names = ", ".join(f".{extension}" for extension in run.extensions)
    return f"{printable(names)} at byte {run.begin:,}"
