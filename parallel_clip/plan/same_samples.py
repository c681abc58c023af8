"""Whether a run that goes on has seen the samples that this config and these shards say: with
others some would come twice, and some never."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from parallel_clip.config import Config, config_from_dict, training_sources
from parallel_clip.data.index.shard_list import ListedShard, describe_differences, read_list
from parallel_clip.errors import InputError
from parallel_clip.plan.resume import SHARDS_FILE, ResumePoint
from parallel_clip.plan.segments import configured_stretches


def require_same_past(resume: ResumePoint, config: Config) -> Collection[int]:
    """Check that a run whose phases have changed, as `resume.allow` lets them, has taken the
    samples up to its checkpoint by what has stayed. Looks at no shard.

    Returns the numbers of the sources whose shards must be those that the run began with: all, or
    those that it has come to, where phases have other sources now.

    Raises:
        InputError: a phase that has begun has other sources or weights, or one that has ended
            another end.
    """
    now = training_sources(config)
    everything = range(len(now.sources))
    if resume.meta is None or resume.meta.config is None:
        return everything
    before = config_from_dict(resume.meta.config)
    position = resume.meta.position
    old, new = _past(before, position), _past(config, position)
    if old != new:
        raise InputError(
            f"{resume.checkpoint} has seen {position:,} pairs, which with these phases would have "
            "been others: a phase that has begun keeps its sources and weights, and one that has "
            "ended its `until` as well. Undo that, or begin a new run from its weights: "
            f"init.from={resume.checkpoint}"
        )
    if _weights(before) == _weights(config):
        return everything
    if not any(key.startswith("phases") for key in resume.accepted):
        # By the text of `shards`, which may differ, as a folder may be moved.
        raise InputError(
            "sources that were the same in several phases are so no longer, or the other way "
            "around: where a folder was moved, name it alike in data.train and phases.*.sources"
        )
    return {number for _, _, sources in new for number in sources}


def _weights(config: Config) -> tuple[Any, ...]:
    found = training_sources(config)
    return found.blends, found.of_phase


def _past(config: Config, position: int) -> list[tuple[int, int, dict[int, Any]]]:
    """By which sources, as the config has them apart from where their shards lie, the first so many
    positions of a run are taken: where each stretch begins, in the run and in its order, and the
    sources by their numbers."""
    found = training_sources(config)
    past = takewhile(lambda stretch: stretch.first < position, configured_stretches(config))
    return [
        (
            stretch.first,
            stretch.begin,
            {
                number: source.model_copy(update={"shards": "", "weight": weight})
                for number, (source, weight) in enumerate(
                    zip(found.sources, found.blends[stretch.order], strict=True)
                )
                if weight
            },
        )
        for stretch in past
    ]


def listed_before(run_dir: Path, kept: Collection[int]) -> list[ListedShard] | None:
    """The shards of those sources that the run began with; None where the list is not there."""
    known = read_list(run_dir / SHARDS_FILE)
    return None if known is None else [shard for shard in known if shard.source in kept]


def require_same_data(
    resume: ResumePoint,
    data_fingerprint: dict[str, Any],
    kept: Collection[int],
    list_shards: Callable[[], Sequence[ListedShard]],
    run_dir: Path,
) -> None:
    """Check that a run resumes over the samples that it began with. A folder that was moved is no
    change.

    kept: the numbers of the sources that must be the same; list_shards: those of training, as they
    are now; asked for only to name what differs.

    Raises:
        InputError: a source has other shards than when the checkpoint was written.
    """
    if resume.step == 0 or resume.meta.data is None:
        return  # a conversion has seen no samples of ours
    before = resume.meta.data
    if before.get("order") != data_fingerprint["order"]:
        raise InputError(
            f"{resume.checkpoint} was written by a version of parallel_clip that puts samples in "
            "another order; go on with that version, or begin a new run from its weights: "
            f"init.from={resume.checkpoint}"
        )
    sources = [(n, before["sources"][n], data_fingerprint["sources"][n]) for n in kept]
    changed = [
        f"source {number} had {old['samples']:,} samples in {old['shards']:,} shards, and now has "
        f"{new['samples']:,} in {new['shards']:,}"
        for number, old, new in sources
        if not _is_same_source(old, new)
    ]
    if not changed:
        return
    known = listed_before(run_dir, kept)
    now = [shard for shard in list_shards() if shard.source in kept]
    named = f" ({describe_differences(known, now)})" if known is not None else ""
    raise InputError(
        f"the training data are not those of {resume.checkpoint}: {'; '.join(changed)}{named}. "
        f"Restore them, or begin a new run from its weights: init.from={resume.checkpoint}"
    )


def _is_same_source(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """By all that both say: an earlier version, and a dry run, say nothing of the contents."""
    return all(
        old[key] == new[key] for key in old.keys() & new.keys() if None not in (old[key], new[key])
    )
