"""AdamW's state in a checkpoint of open_clip_train, by the names of the parameters.

torch numbers an optimizer's parameters through its groups. open_clip_train makes two: what is not
decayed, then the rest, each in the order of `named_parameters()`, which is that of the state dict.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parallel_clip.convert.plain_tensors import check_plain, is_tensor
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
    state, numbers = optimizer["state"], _numbers(optimizer.get("param_groups"))
    if not isinstance(state, Mapping) or numbers is None:
        raise InputError(
            f"the optimizer in {file} is not the state dict of one of torch's: it needs state by "
            "the number of a parameter, and param_groups that list these numbers"
        )
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
    steps = {_whole(state[number]["step"]) for number in numbered.values()}
    if len(steps) != 1 or None in steps or 0 in steps:
        shown = ", ".join(sorted(map(str, steps)))
        raise InputError(f"AdamW's steps in {file} have to be one number of updates, not {shown}")
    moments: dict[str, dict[str, Tensor]] = {}
    for name, number in numbered.items():
        entry = moments[global_names[name]] = {}
        for kind in MOMENTS:
            check_plain(state[number][kind], f"{kind} of {name} in {file}")
            entry[kind] = state[number][kind].reshape(shapes[name])
    return AdamWState(steps.pop(), moments)


def _numbers(groups: Any) -> list[list[int]] | None:
    """The numbers of the parameters in each group, each once; None where it is something else."""
    if not isinstance(groups, list) or not all(isinstance(group, Mapping) for group in groups):
        return None
    numbers = [group.get("params") for group in groups]
    if not all(isinstance(held, list) for held in numbers):
        return None
    listed = sum(numbers, [])
    is_numbered = all(type(number) is int for number in listed) and len({*listed}) == len(listed)
    return numbers if is_numbered else None


def _whole(step: Any) -> int | None:
    """A step, which is a number or a tensor of one; None where it is none."""
    if isinstance(step, Tensor):
        is_one = step.layout == torch.strided and step.device.type == "cpu" and step.numel() == 1
        step = step.item() if is_one else None
    is_whole = isinstance(step, int | float) and step == step // 1 and step >= 0
    return int(step) if is_whole else None


def _fits(entry: Any, shape: Shape) -> bool:
    return (
        isinstance(entry, Mapping)
        and set(entry) == {"step", *MOMENTS}
        and all(is_tensor(entry[kind]) and tuple(entry[kind].shape) == shape for kind in MOMENTS)
    )
