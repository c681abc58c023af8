"""What is decayed, and what is kept in fp32."""

import pytest
import torch

from parallel_clip.layout import Layout
from parallel_clip.model.architecture import parameter_table
from parallel_clip.model.known_models import known_names, load_architecture
from tests import reference
from tests.small_models import image_batch, small_model, token_batch
from tests.training.step_cases import Task, masters


@pytest.mark.parametrize("name", known_names())
def test_decayed_as_in_openclips_trainer(name):
    table = parameter_table(load_architecture(name))
    for parameter in table:
        theirs = reference.decayed(parameter.name, torch.empty(parameter.shape, device="meta"))
        assert parameter.decayed == theirs, parameter.name
    assert {p.decayed for p in table} == {True, False}


@pytest.mark.parametrize("zero", [True, False], ids=["zero", "whole"])
@pytest.mark.parametrize("layout", [Layout(2), Layout(2, tensor=2, sequence=True)], ids=str)
def test_masters_and_gradients_are_fp32_in_a_bf16_run(processes, layout, zero):
    model_cfg = small_model()
    task = Task(
        model_cfg,
        reference.random_weights(model_cfg, seed=1),
        image_batch(model_cfg, 8),
        token_batch(model_cfg, 8),
        {"parallel": {"distributed_optimizer": zero}},
    )
    names = set()
    for held in processes.run(layout, masters, task=task):
        names |= held.keys()
        for name, (values, master, dtypes) in held.items():
            assert set(dtypes) == {torch.float32}, name
            expected = torch.float32 if name == "logit_scale" else torch.bfloat16
            assert values.dtype == expected, name
            assert torch.equal(values, master.to(expected)), name
            if expected == torch.bfloat16 and len(master) > 100:
                assert not torch.equal(values.float(), master), f"{name}: no bits below bf16"
    assert names == task.weights.keys()
