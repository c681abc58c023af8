"""What ranks do in test_average.py."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from parallel_clip.engine.groups import Groups
from parallel_clip.loss import ClipLoss
from parallel_clip.model.megatron_config import DTYPES
from parallel_clip.model.openclip_json import architecture_from_json
from parallel_clip.optimizer.train_state import TrainState
from parallel_clip.training.step import TrainStep
from tests.ranks import config_of, loaded_training, own_microbatches
from tests.training.step_cases import Task


def exchange(groups: Groups, task: Task) -> tuple[dict[str, Tensor], bool, bool]:
    """After two steps the averages take the place of the weights, and go back. This rank's tensors
    in between by name; whether they were the averages then, as far as this rank owns them; and
    whether everything has the bits of before in the end."""
    state = _trained(groups, task)
    before = _everything(state)
    averages = {p.name: state.average.of(t).clone() for p, t in _owned(state)}
    state.average.exchange_with_weights()
    held = {p.name: t.detach().clone() for p, t in state.global_parameters()}
    are_averages = True
    for parameter, tensor in _owned(state):
        part = state.optimizer.owned_state(tensor)
        values = tensor.detach().view(-1)[part.start : part.stop]
        are_averages &= torch.equal(values, averages[parameter.name].to(tensor.dtype))
        are_averages &= torch.equal(part.master, averages[parameter.name])
    state.average.exchange_with_weights()
    return held, are_averages, all(map(torch.equal, before, _everything(state)))


class _Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def operators(groups: Groups, task: Task) -> tuple[list[str], list[str]]:
    """What an update of the averages calls where `every` is 2, after the third and fourth step."""
    state, called = _trained(groups, task), []
    for number in (3, 4):
        with _Operators() as seen:
            state.average.after_update(number)
        called.append(seen.names)
    return called[0], called[1]


def _trained(groups: Groups, task: Task) -> TrainState:
    config = config_of(groups.layout, **task.settings)
    architecture = architecture_from_json(task.model_cfg, "small")
    state = loaded_training(groups, config, architecture, task.weights)
    images = task.images.to(DTYPES[config.precision])
    batch = own_microbatches(groups, images, task.tokens, 2)
    step = TrainStep(state, ClipLoss(group=groups.data), 0, groups.pipeline)
    for number in (1, 2):
        step(batch, lr=1e-3)
        state.average.after_update(number)
    return state


def _owned(state: TrainState) -> list:
    found = state.global_parameters()
    return [(p, t) for p, t in found if state.optimizer.owned_state(t) is not None]


def _everything(state: TrainState) -> list[Tensor]:
    """Weights, and what this rank owns of masters, moments and averages."""
    found = [t for _, t in state.global_parameters()]
    for _, tensor in _owned(state):
        part = state.optimizer.owned_state(tensor)
        found += [part.master, *part.moments.values(), state.average.of(tensor)]
    return [tensor.detach().clone() for tensor in found]
