"""What ranks do in test_checkpointer.py."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import psutil
import torch
from torch import Tensor

from parallel_clip.checkpoint import commit
from parallel_clip.checkpoint.checkpointer import Checkpointer
from parallel_clip.checkpoint.collect import collect_pieces
from parallel_clip.checkpoint.meta import Meta
from parallel_clip.engine.groups import Groups
from parallel_clip.loss import ClipLoss
from parallel_clip.model.megatron_config import DTYPES
from parallel_clip.model.openclip_json import architecture_from_json
from parallel_clip.optimizer.train_state import TrainState
from parallel_clip.training.step import TrainStep
from tests.ranks import config_of, empty_training, loaded_training, own_microbatches
from tests.training.step_cases import Task

LR = 1e-3


def train_and_save(groups: Groups, task: Task, steps: int, run_dir: Path) -> dict[str, Tensor]:
    """Train and save; this rank's tensors of the model by name."""
    built = _loaded(groups, task)
    _train(groups, task, built, steps)
    _save(groups, task, built, steps, run_dir)
    return _tensors(built)


def load_and_save(groups: Groups, task: Task, sources: dict[str, Path], target: Path) -> dict:
    """Load each checkpoint into this layout and save it again under its name in `target`; this
    rank's tensors of the model, by source and name."""
    held = {}
    for name, source in sources.items():
        built = _empty(groups, task)
        meta = Checkpointer(target / name, groups).load(source, built)
        _save(groups, task, built, meta.step, target / name)
        held[name] = _tensors(built)
    return held


def interrupt(groups: Groups, task: Task, run_dir: Path) -> tuple[list, list, bool]:
    """Records of steps 3 and 4, of a run without a break and of one that was saved and loaded
    before them, and whether both have the same bits in weights, masters, moments and averages."""
    whole = _loaded(groups, task)
    expected = _train(groups, task, whole, 4)[2:]

    first = _loaded(groups, task)
    _train(groups, task, first, 2)
    _save(groups, task, first, 2, run_dir)
    second = _empty(groups, task)
    Checkpointer(run_dir, groups).load(commit.latest(run_dir), second)
    records = _train(groups, task, second, 2, first=3)
    equal = all(map(torch.equal, _state(whole), _state(second)))
    return records, expected, equal


def collect_and_go_on(groups: Groups, task: Task) -> list[tuple[str, bool, bool]]:
    """Pieces collected before a step and still held after it: their keys, whether they are what
    they were, and whether the step changed what they were copied from."""
    state = _loaded(groups, task)
    _train(groups, task, state, 1)
    held = list(collect_pieces(state, groups))
    before = [piece.values.clone() for piece in held]
    _train(groups, task, state, 1, first=2)
    now = collect_pieces(state, groups)
    return [
        (piece.key, torch.equal(piece.values, values), not torch.equal(values, after.values))
        for piece, values, after in zip(held, before, now, strict=True)
    ]


def save_many(groups: Groups, task: Task, saves: int, run_dir: Path) -> list[tuple[int, int, int]]:
    """(descriptors, threads, resident MiB) of this rank after each tenth of so many saves, every
    other one asynchronous."""
    if groups.is_rank_zero:
        run_dir.mkdir()
    state, found = _loaded(groups, task), []
    writers = [Checkpointer(run_dir, groups, 2, asynchronous=way) for way in (False, True)]
    for number in range(1, saves + 1):
        writer = writers[number % 2]
        writer.save(Meta(number, 0, 0, "small", task.model_cfg, {}), state)
        writer.finish()
        if number % (saves // 10) == 0:
            own = psutil.Process()
            memory = own.memory_info().rss >> 20
            found.append((own.num_fds(), own.num_threads(), memory))
    return found


def _loaded(groups: Groups, task: Task) -> TrainState:
    config = config_of(groups.layout, **task.settings)
    architecture = architecture_from_json(task.model_cfg, "small")
    return loaded_training(groups, config, architecture, task.weights)


def _empty(groups: Groups, task: Task) -> TrainState:
    """Model and optimizer full of other numbers, which loading must leave nothing of."""
    config = config_of(groups.layout, **task.settings)
    built = empty_training(groups, config, architecture_from_json(task.model_cfg, "small"))
    for _, tensor in built.global_parameters():
        built.set_weight(tensor, torch.full(tensor.shape, 7.0))
        if built.average is not None:
            built.average.set(tensor, torch.full(tensor.shape, 8.0))
    return built


def _train(groups: Groups, task: Task, built: TrainState, steps: int, first: int = 1) -> list[dict]:
    """Steps from the `first` on, counted from 1."""
    dtype = DTYPES[task.settings.get("precision", "fp32")]
    batch = own_microbatches(groups, task.images.to(dtype), task.tokens, 2)
    step = TrainStep(built, ClipLoss(group=groups.data), 0, groups.pipeline)
    records = []
    for number in range(first, first + steps):
        records.append(asdict(step(batch, LR).record))
        if built.average is not None:
            built.average.after_update(number)
    return records


def _save(groups: Groups, task: Task, built: TrainState, step: int, run_dir: Path) -> None:
    meta = Meta(step, step * len(task.images), 0, "small", task.model_cfg, {}, updates=step)
    meta = replace(meta, has_averages=built.average is not None)
    if groups.is_rank_zero:
        run_dir.mkdir(exist_ok=True)
    Checkpointer(run_dir, groups).save(meta, built)


def _tensors(built: TrainState) -> dict[str, Tensor]:
    return {p.name: tensor.detach().clone() for p, tensor in built.global_parameters()}


def _state(built: TrainState) -> list[Tensor]:
    """Weights, and what this rank owns of masters, moments and averages."""
    tensors = []
    for _, tensor in built.global_parameters():
        owned = built.optimizer.owned_state(tensor)
        tensors.append(tensor)
        if owned is not None:
            tensors += [owned.master, *owned.moments.values()]
        if owned is not None and built.average is not None:
            tensors.append(built.average.of(tensor))
    return tensors
