"""Which keys of a config may differ when a run is resumed."""

from __future__ import annotations

from typing import Any

from parallel_clip.config.keys import Config
from parallel_clip.config.schema import show

_FREE_ON_RESUME = (
    "parallel.",
    "batch.micro",
    "recompute",
    "data.workers",
    "data.prefetch",
    "data.worker_patience",
    "data.cache",
    "log.",
    "evaluate.",
    "checkpoint.",
    "run_dir",
)


def resume_differences(saved: Config, new: Config) -> list[str]:
    """The keys that keep `new` from going on with a run of `saved`: 'key: saved → new' each.

    Free to differ are those that change no result, and a longer `train` at constant learning rate.
    """
    before, after = _flat(saved.to_tree()), _flat(new.to_tree())
    constant = saved.schedule.kind == new.schedule.kind == "constant"
    differences = []
    for key in dict.fromkeys([*before, *after]):
        old, now = before.get(key), after.get(key)
        longer = key.startswith("train.") and None not in (old, now) and now > old
        if old == now or key.startswith(_FREE_ON_RESUME) or longer and constant:
            continue
        differences.append(f"{key}: {show(old)} → {show(now)}")
    return differences


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted keys to plain values; lists are opened where their entries are sections."""
    if isinstance(tree, dict) and tree:
        items = tree.items()
    elif isinstance(tree, list) and any(isinstance(entry, dict) for entry in tree):
        items = enumerate(tree)
    else:
        return {prefix.rstrip("."): tree}
    return {k: v for key, below in items for k, v in _flat(below, f"{prefix}{key}.").items()}
