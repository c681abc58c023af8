"""What the stages of real processes hold in a step, to the byte, against the arithmetic of 1F1B.

A step is run twice, and nothing may be left of the first.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate

import pytest

from parallel_clip.layout import Layout
from parallel_clip.pipeline.orders import OpKind, PipelineOp, peak_graphs, step_orders
from tests import reference
from tests.pipeline.forward_backward_cases import Way
from tests.pipeline.memory_cases import peaks
from tests.small_models import image_batch, small_model, token_batch

MODEL = small_model({"layers": 5}, {"layers": 4})
PAIRS = 3  # in a microbatch
MICROBATCHES = 5
WAYS = [Way(MICROBATCHES, stash) for stash in (0, 2, MICROBATCHES)]
SCALE_GRADIENT = 4  # bytes

LAYOUTS = {
    "alone": Layout(1),
    "pipeline3": Layout(3, pipeline=3),
    "pipeline2-virtual2": Layout(2, pipeline=2, virtual_pipeline=2),
    "tensor2-sequence-pipeline2": Layout(4, tensor=2, pipeline=2, sequence=True),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_the_fullest_moment_of_a_step_is_the_arithmetics_to_the_byte(processes, layout):
    pairs = PAIRS * MICROBATCHES
    answers = processes.run(
        layout,
        peaks,
        model_cfg=MODEL,
        weights=reference.random_weights(MODEL, seed=3),
        images=image_batch(MODEL, pairs),
        tokens=token_batch(MODEL, pairs),
        ways=WAYS,
        settings={},
    )
    for rank, (measured, counted) in enumerate(answers):
        stage = layout.coordinates(rank).pipeline
        for way in WAYS:
            counts = way.microbatches, way.stash
            order = step_orders(layout.pipeline, *counts, layout.virtual_pipeline)[stage]
            where = f"rank {rank}, {way}"
            for step in measured[way]:
                assert step.graphs == peak_graphs(order), where
                assert step.graph_bytes == peak_graphs(order, counted[way]), where
                assert step.other_bytes == other_bytes(layout, stage, order), where
                assert (step.graphs_left, step.bytes_left) == (0, 0), where
                if layout.virtual_pipeline == 1:
                    assert step.graphs == graphs_by_hand(layout.pipeline - stage, *counts), where
                    assert step.graph_bytes == step.graphs * counted[way][0], where


def graphs_by_hand(stages_from_here: int, microbatches: int, stash: int) -> int:
    """1F1B has as many microbatches on the way as there are stages from here to the end."""
    return stash + min(stages_from_here, microbatches - stash)


def other_bytes(layout: Layout, stage: int, order: Iterable[PipelineOp]) -> int:
    """What backward begins with, on the last stage: the gradients of the features of each
    microbatch that has gone forward there and not yet backward, fp32."""
    if stage < layout.pipeline - 1:
        return 0
    changes = {OpKind.FORWARD_AGAIN: 1, OpKind.REPLAY: 1, OpKind.BACKWARD: -1}
    last = layout.virtual_pipeline - 1
    waiting = max(accumulate(changes.get(op.kind, 0) for op in order if op.chunk == last))
    return waiting * 2 * PAIRS * MODEL["embed_dim"] * 4 + SCALE_GRADIENT
