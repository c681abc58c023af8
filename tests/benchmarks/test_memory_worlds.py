"""What a GPU holds beside OpenCLIP's DDP and FSDP2, on 1 to 1,024 GPUs."""

from io import StringIO
from math import prod
from pathlib import Path

import pytest
from rich.console import Console

from parallel_clip.engine.without_gpus import call_without_gpus
from parallel_clip.layout import Layout
from parallel_clip.model.architecture import parameter_table
from parallel_clip.model.openclip_json import architecture_from_json
from tests.small_models import small_model

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(BENCHMARKS)
    import memory_checks
    import memory_worlds
    from memory_counts import Counts
    from memory_openclip import Forward, Fsdp2Step, OpenClipCounts

PAIRS, LOSS = 4, 17
SMALL = architecture_from_json(small_model(), "small")


@pytest.fixture
def benchmarks_in_other_processes(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)


def test_openclips_small_model_is_counted_by_its_parameters(benchmarks_in_other_processes):
    # In a process of its own: without a GPU, ours makes CPU tensors of those of a GPU.
    found = call_without_gpus(memory_checks.count_small_openclip)
    table = [parameter.shape for parameter in parameter_table(memory_checks.SMALL)]
    weights = 4 * sum(map(prod, table))
    assert found["ddp"] == (weights, weights, 2 * weights, weights), "buckets beside gradients"
    halves = sum(-(-shape[0] // 2) * prod(shape[1:]) if shape else 1 for shape in table)
    assert found["fsdp2"][0] == 4 * halves, "whole rows of the first dimension"

    plain, again = found["autocast"]
    blocks = 2 * 2 * 12 * 64 * 64  # numbers of the matrices of two towers' two layers
    assert 2 * blocks < plain.constant < 2 * blocks * 1.25, "bf16 copies of weights"
    assert again.constant < plain.constant / 5
    assert again.of_a_pair < plain.of_a_pair / 5


@pytest.mark.long  # half a minute: two processes that import torch
def test_openclips_small_model_in_real_processes_holds_what_is_counted(
    benchmarks_in_other_processes,
):
    memory_checks.check_openclip_against_processes()


def test_kinds_are_added_up_for_each_number_of_gpus(monkeypatch):
    rows = _measure(monkeypatch, [1, 2, 16])
    of = {(row.question, row.name, row.gpus): row.held for row in rows}
    micro, batch = memory_worlds.QUESTIONS
    assert (micro, "OpenCLIP, FSDP2", 1) not in of, "nothing to split over"
    assert (micro, "ours, tensor 4, ZeRO-1", 2) not in of, "too few GPUs"
    assert (batch, "ours, tensor 4 x pipeline 4", 16) in of

    alone, ddp = (of[micro, "OpenCLIP, DDP", gpus] for gpus in (1, 2))
    assert (alone.buffers, ddp.buffers) == (0, 400)
    assert (ddp.weights, ddp.gradients, ddp.optimizer, ddp.copies) == (400, 400, 800, 190)
    assert (ddp.activations, ddp.loss) == (10 * PAIRS, LOSS)
    # While gradients come, what forward kept goes: 40 of a microbatch, 190 of copies, the loss.
    assert ddp.at_once == ddp.total - (40 + 190 + LOSS)
    accumulated = of[batch, "OpenCLIP, DDP", 2]
    assert accumulated.at_once == accumulated.total, "gradients stay from microbatch to microbatch"
    assert accumulated.inputs == memory_worlds.BATCH // 2 * ddp.inputs // PAIRS
    again = of[micro, "OpenCLIP, DDP, recompute", 2]
    assert (again.activations, again.copies) == (PAIRS, 190)
    fsdp = of[micro, "OpenCLIP, FSDP2", 2]
    assert (fsdp.weights, fsdp.copies, fsdp.buffers) == (4 * 50, 30, 7)

    held = Counts(SMALL, PAIRS).held(Layout(2), "none", zero=True)
    ours = of[micro, "ours, data, ZeRO-1", 2]
    assert (ours.weights, ours.gradients, ours.optimizer, ours.activations) == (
        held.weights,
        held.gradients,
        held.optimizer,
        held.saved,
    )


def test_tables_and_pictures_have_every_trainer(monkeypatch):
    rows = _measure(monkeypatch, [1, 8])
    console = Console(file=StringIO(), width=200)
    memory_worlds.print_worlds(console, "small", rows)
    printed = console.file.getvalue()
    assert "GB by kind on 8 GPUs" in printed and "OpenCLIP, FSDP2, recompute" in printed
    figure = memory_worlds.draw_worlds(rows, PAIRS, "a machine")
    names = {row.name for row in rows if row.question == memory_worlds.SAME_MICROBATCH}
    assert len(figure.axes[0].lines) == len(names) + 1, "and the line at 80 GB"


def _measure(monkeypatch, worlds):
    """Of a small model, where OpenCLIP's has 100 parameters."""

    def counted(function, name, pairs, worlds, losses):
        return OpenClipCounts(
            100,
            {gpus: 100 // gpus for gpus in worlds},
            400,
            (Forward(10, 190), Forward(1, 5)),
            (Forward(9, 3), Forward(1, 3)),
            (Fsdp2Step(30, 7, 999), Fsdp2Step(30, 7, 999)),
            dict.fromkeys(losses, LOSS),
        )

    monkeypatch.setattr(memory_worlds, "call_without_gpus", counted)
    monkeypatch.setattr(memory_worlds, "PIPELINE", 4)
    return list(memory_worlds.measure_worlds(Counts(SMALL, PAIRS), worlds))
