"""How often in a step the host waits for the device: once, in training/exchange.py:tell_all."""

import warnings
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from parallel_clip.loss import ClipLoss
from parallel_clip.model.openclip_json import architecture_from_json
from parallel_clip.plan.layout_plan import choose_stash
from parallel_clip.training.step import TrainStep
from tests.gpu.step_runs import LR, MICROBATCHES, task_on
from tests.ranks import config_of, loaded_training, own_microbatches

pytestmark = pytest.mark.gpu

STEPS = 3


@contextmanager
def counted_waits():
    """A list to which each operation inside for which the host waits for the GPU adds a line."""
    found: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found += [
        f"{warning.filename}:{warning.lineno}"
        for warning in caught
        if "synchronizing CUDA operation" in str(warning.message)
    ]


class ItemReads(TorchDispatchMode):
    """Counts reads of single numbers: all that the CPU can show of what would wait on a GPU."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("schedule", ["stash", "two-pass"])
def test_a_step_waits_for_the_device_once(groups, precision, recompute, schedule):
    task = task_on(groups, precision, recompute, schedule)
    config = config_of(groups.layout, **task.settings)
    built = loaded_training(
        groups, config, architecture_from_json(task.model_cfg, "small"), task.weights
    )
    batch = own_microbatches(groups, task.images, task.tokens, MICROBATCHES)
    stash = choose_stash(config.parallel, MICROBATCHES)
    step = TrainStep(built, ClipLoss(group=groups.data), stash, groups.pipeline)
    for _ in range(2):  # the first compares shapes and makes the optimizer's state
        step(batch, LR)
    if groups.device.type == "cpu":
        with ItemReads() as reads:
            for _ in range(STEPS):
                step(batch, LR)
        # What tell_all reads is an array, which is not counted here.
        assert reads.count == 0
        return
    with counted_waits() as waits:
        for _ in range(STEPS):
            step(batch, LR)
    assert len(waits) == STEPS, waits
