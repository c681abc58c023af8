"""Which keys of a config may differ when a run is resumed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from parallel_clip.config.keys import Config
from parallel_clip.config.phases import has_shares
from parallel_clip.config.schema import keys_of, show

# What changes no result, or only how a run is watched and kept.
_FREE = (
    "parallel.",
    "batch.micro",
    "recompute",
    "loss.exchange",
    "loss.stages",
    "loss.tile",
    "data.workers",
    "data.prefetch",
    "data.worker_patience",
    "data.cache",
    "data.normalize",
    "data.storage_options",
    "data.retries",
    "data.timeout",
    "data.missing",  # and so on: the shards themselves are compared
    "data.max_missing_fraction",
    "data.exclude",
    "log.",
    "evaluate.",
    "checkpoint.",
    "watchdog.",
    "bad_steps.",
    "resume.",
    "plan.",
    "train.time_limit",
    "run_dir",
)
_SHARDS = re.compile(r"(data\.train|phases\.\d+\.sources)\.\d+\.shards")
# What the order of samples and the position in it depend on.
_NEVER = ("batch.global", "seed", "model", "data.train")


class Differences(NamedTuple):
    """The keys in which a config differs from that of a run, 'key: saved → new' each."""

    refused: list[str]
    accepted: list[str]


def resume_differences(saved: Config, new: Config) -> Differences:
    """What differs in `new` from the run of `saved`, but for what is free to: keys that change no
    result, and a longer `train` where no learning rate and no phase depends on the length.
    `resume.allow` of `new` accepts more."""
    before, after = _flat(saved.to_tree()), _flat(new.to_tree())
    constant = saved.schedule.kind == new.schedule.kind == "constant" and not has_shares(new)
    found = Differences([], [])
    for key in dict.fromkeys([*before, *after]):
        old, now = before.get(key), after.get(key)
        if _SHARDS.fullmatch(key):
            continue  # a folder may be moved; what is in the shards is compared elsewhere
        longer = key.startswith("train.") and None not in (old, now) and now > old
        if old == now or key.startswith(_FREE) or longer and constant:
            continue
        (found.accepted if is_allowed(key, new) else found.refused).append(
            f"{key}: {show(old)} → {show(now)}"
        )
    return found


def is_allowed(key: str, config: Config) -> bool:
    """Whether `resume.allow` names a key, or a section that it is in."""
    return any(_is_below(key, name) for name in config.resume.allow)


def check_allowed(names: Sequence[str]) -> Iterator[str]:
    """What is wrong with `resume.allow`: a name that is no key, or one that may never differ."""
    keys = [path for path, _ in keys_of(Config)]
    for name in names:
        if not any(_is_below(key, name) for key in keys):
            yield f"resume.allow names {name!r}, which is no key"
        for never in _NEVER:
            if _is_below(name, never) or _is_below(never, name):
                yield (
                    f"resume.allow names {name!r}: the order of samples and the position in it "
                    f"depend on {never}; begin a new run from the weights instead, with init.from"
                )


def _is_below(key: str, name: str) -> bool:
    return f"{key}.".startswith(f"{name}.")


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted keys to plain values; lists are opened where their entries are sections."""
    if isinstance(tree, dict) and tree:
        items = tree.items()
    elif isinstance(tree, list) and any(isinstance(entry, dict) for entry in tree):
        items = enumerate(tree)
    else:
        return {prefix.rstrip("."): tree}
    return {k: v for key, below in items for k, v in _flat(below, f"{prefix}{key}.").items()}
