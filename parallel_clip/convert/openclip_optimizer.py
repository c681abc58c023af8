"""AdamW's state in a checkpoint of open_clip_train, by the names of the parameters.

torch numbers an optimizer's parameters through its groups. open_clip_train makes two: what is not
decayed, then the rest, each in the order of `named_parameters()`, which is that of the state dict.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from parallel_clip.errors import InputError
from parallel_clip.optimizer import MOMENTS

Shape = tuple[int, ...]

_NO_DECAY_WORDS = ("bn", "ln", "bias", "logit_scale")
_EMBEDDINGS = ("positional_embedding", "class_embedding")


def _spared_3(name: str, shape: Shape) -> bool:
    """Whether open_clip 3.x decays a parameter not (open_clip_train/main.py, `exclude`)."""
    return len(shape) < 2 or any(word in name for word in _NO_DECAY_WORDS)


def _spared_4(name: str, shape: Shape) -> bool:
    """Likewise open_clip 4, and timm's optimizers by their rule of dimensions."""
    return _spared_3(name, shape) or name.endswith(_EMBEDDINGS)


def _spared_timm(name: str, shape: Shape) -> bool:
    return len(shape) < 2 or name.endswith(".bias")


_RULES: tuple[Callable[[str, Shape], bool], ...] = (_spared_3, _spared_4, _spared_timm)


@dataclass(frozen=True)
class AdamWState:
    """step: updates done; moments: by a parameter's global name, `exp_avg` and `exp_avg_sq`."""

    step: int
    moments: Mapping[str, Mapping[str, Tensor]]


def read_adamw(
    content: Mapping[str, Any] | None,
    stored_names: Mapping[str, str],
    shapes: Mapping[str, Shape],
    file: Path,
) -> AdamWState:
    """The moments of every parameter.

    content: of the checkpoint; stored_names: of the parameters, by their global ones; shapes: of
    the tensors in the state dict, in its order.

    Raises:
        InputError: there is no optimizer, or it is not AdamW's over all parameters.
    """
    optimizer = (content or {}).get("optimizer")
    if not isinstance(optimizer, Mapping) or not optimizer.get("state"):
        raise InputError(
            f"{file} holds no optimizer state: open_clip_train writes it into epoch_N.pt; leave "
            "--with-optimizer out to take the weights alone"
        )
    global_names = {stored: name for name, stored in stored_names.items()}
    trained = [name for name in shapes if name in global_names]
    state = optimizer["state"]
    numbers = [list(group["params"]) for group in optimizer["param_groups"]]
    for spared in _RULES:
        groups = [
            [name for name in trained if spared(name, shapes[name])],
            [name for name in trained if not spared(name, shapes[name])],
        ]
        if [len(group) for group in groups] != [len(group) for group in numbers]:
            continue
        numbered = dict(zip(sum(groups, []), sum(numbers, []), strict=True))
        if all(_fits(state.get(number), shapes[name]) for name, number in numbered.items()):
            break
    else:
        raise InputError(
            f"the optimizer in {file} is not open_clip_train's AdamW over all {len(trained)} "
            f"parameters: it has groups of {', '.join(str(len(group)) for group in numbers)}, and "
            f"moments of {len(state)}; one of a locked tower, or another optimizer, cannot be moved"
        )
    steps = {int(state[number]["step"]) for number in numbered.values()}
    if len(steps) != 1 or 0 in steps:
        raise InputError(f"AdamW's steps in {file} differ between parameters: {sorted(steps)}")
    moments = {
        global_names[name]: {kind: state[number][kind].reshape(shapes[name]) for kind in MOMENTS}
        for name, number in numbered.items()
    }
    return AdamWState(steps.pop(), moments)


def _fits(entry: Any, shape: Shape) -> bool:
    return (
        isinstance(entry, Mapping)
        and set(entry) == {"step", *MOMENTS}
        and all(tuple(entry[kind].shape) == shape for kind in MOMENTS)
    )
