"""Pictures go to the device one microbatch ahead of the schedule, as bytes, and are let go when
used."""

import pytest

from parallel_clip.layout import Layout
from parallel_clip.pipeline.inputs import Pictures, StepInputs
from tests import reference
from tests.small_models import image_batch, small_model, token_batch
from tests.training.feed_cases import feed_a_step

LAYOUTS = {
    "tensor2-sequence": Layout(2, tensor=2, sequence=True),
    "pipeline2": Layout(2, pipeline=2),
    "pipeline2-virtual2": Layout(2, pipeline=2, virtual_pipeline=2),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_each_pass_fetches_pictures_in_order_and_holds_one_microbatch(processes, layout):
    model_cfg = small_model({"patch_dropout": 0.4})
    answers = processes.run(
        layout,
        feed_a_step,
        model_cfg=model_cfg,
        weights=reference.random_weights(model_cfg, seed=3),
        images=image_batch(model_cfg, 8),
        tokens=token_batch(model_cfg, 8),
        micro=2,
        stash=1,
    )
    for rank, answer in enumerate(answers):
        first_stage = layout.coordinates(rank).pipeline == 0
        # Pass 1 runs all four, pass 2 those without a graph.
        assert answer.fetched == ([0, 1, 2, 3, 0, 1, 2] if first_stage else [])
        assert answer.most_held == (1 if first_stage else 0)  # of the next the bytes alone
        assert (answer.left, answer.same_bits) == (0, True)


def test_pictures_are_prepared_one_ahead():
    done = []

    def fetch(number):
        done.append(f"fetch {number}")
        return Pictures(f"pictures {number}")

    inputs = StepInputs(["tokens"] * 3, fetch, lambda number: done.append(f"prepare {number}"))
    for first in (0, 0):  # two passes
        assert inputs.pictures(first, following=1) == ("pictures 0", None)
        assert inputs.pictures(1, following=2) == ("pictures 1", None)
        assert inputs.pictures(2, following=None) == ("pictures 2", None)
    assert done == ["fetch 0", "prepare 1", "fetch 1", "prepare 2", "fetch 2"] * 2
