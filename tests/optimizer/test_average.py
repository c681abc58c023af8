"""The average of the weights in the place of the weights; tests/parity compares its values with
those of open_clip, tests/checkpoint takes it through layouts."""

import pytest
import torch

from parallel_clip.layout import Layout
from parallel_clip.model.architecture import parameter_table
from parallel_clip.model.openclip_json import architecture_from_json
from tests import reference
from tests.optimizer.average_cases import exchange, operators
from tests.ranks import copies, whole_tensors
from tests.small_models import image_batch, small_model, token_batch
from tests.training.step_cases import Task

MODEL = small_model()
TABLE = parameter_table(architecture_from_json(MODEL, "small"))

LAYOUTS = {
    # name: layout, precision, ZeRO-1
    "one-fp32": (Layout(1), "fp32", True),
    "data2-zero-fp32": (Layout(2), "fp32", True),
    "data2-whole-bf16": (Layout(2), "bf16", False),
    "data2-tensor2-zero-bf16": (Layout(4, tensor=2, sequence=True), "bf16", True),
    "data2-pipeline2-virtual2-bf16": (Layout(4, pipeline=2, virtual_pipeline=2), "bf16", True),
    "pipeline2-frozen-fp32": (Layout(2, pipeline=2), "fp32", True),  # the first stage has none
}


def task(name: str) -> Task:
    _, precision, zero = LAYOUTS[name]
    settings = {
        "precision": precision,
        "parallel": {"distributed_optimizer": zero},
        "ema": {"decay": 0.6, "every": 2},
    }
    if "frozen" in name:
        settings["freeze"] = {"vision": "all", "text": {"unlocked_groups": 1}}
    images, tokens = image_batch(MODEL, 8), token_batch(MODEL, 8)
    return Task(MODEL, reference.random_weights(MODEL, seed=3), images, tokens, settings)


@pytest.mark.parametrize("name", LAYOUTS)
def test_averages_and_weights_change_places_and_back(processes, name):
    layout = LAYOUTS[name][0]
    ranks = processes.run(layout, exchange, task=task(name))
    assert all(are_averages and restored for _, are_averages, restored in ranks)
    # What a rank does not own has come from the one that does.
    first, *others = (whole_tensors(TABLE, of) for of in copies(layout, [r[0] for r in ranks]))
    for other in others:
        assert all(torch.equal(other[name], first[name]) for name in first)


def test_an_update_is_one_operator_for_all_tensors(processes):
    name = "data2-tensor2-zero-bf16"
    for between, due in processes.run(LAYOUTS[name][0], operators, task=task(name)):
        assert between == [] and due == ["aten._foreach_lerp_.Scalar"]
