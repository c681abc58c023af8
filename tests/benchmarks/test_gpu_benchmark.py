"""The parts of benchmarks/gpu.py that need no GPU: its arithmetic, its steps, its tables."""

import argparse
import importlib
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from parallel_clip.engine.groups import close_groups, join_world, make_groups
from parallel_clip.engine.launch import Launch
from parallel_clip.layout import Layout
from parallel_clip.model.openclip_json import architecture_from_json
from tests import reference
from tests.small_models import image_batch, token_batch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def kit():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        names = ("gpu", "gpu_measure", "gpu_profile", "gpu_subjects")
        yield argparse.Namespace(**{name: importlib.import_module(name) for name in names})


@pytest.fixture(scope="module")
def case(kit):
    join_world(Launch(0, 0, 1))
    architecture = architecture_from_json(kit.gpu.TINY, "tiny")
    yield kit.gpu_subjects.Case(architecture, 2, 2, make_groups(Layout(1)))
    close_groups()


def test_the_rehearsal_prints_its_tables(kit, capsys):
    arguments = argparse.Namespace(
        models=[], micro=[2], microbatches=2, rounds=2, only=["ours, full", "bytes"],
        peak_tflops=1e-3, deterministic=False, rehearse=True,
    )  # fmt: skip
    console = Console(width=150, force_terminal=False)
    results = kit.gpu.benchmark(arguments, console)
    (case,) = results["cases"]
    rows = {row["subject"]: row for row in case["rows"]}
    names = ["ours, full, stash", "ours, full, two-pass", "ours, pictures sent as bytes"]
    assert list(rows) == names
    assert [row["failed"] for row in case["rows"]] == [None] * 3
    # Of the peak that was given, by the formula.
    flops, seconds = case["flops_per_pair"], rows[names[0]]["median_seconds"]
    assert rows[names[0]]["share_of_peak_flops"] == pytest.approx(flops * 4 / (seconds * 1e9))
    counted = [rows[name]["counted_bytes"] for name in names[:2]]
    assert counted[0] > counted[1] > 0  # stash keeps more graphs than two-pass
    kit.gpu.print_tables(results, console)
    assert "counted" in (said := capsys.readouterr().out) and names[2] in said
    kit.gpu.draw(results)


def test_all_subjects_train_the_same_weights_on_the_same_pairs(kit, case):
    """bf16 in all, rounded at other places; bytes are other pictures."""
    losses = {s.name: s.build(case)() for s in kit.gpu_subjects.subjects("eager")}
    other = losses.pop("ours, pictures sent as bytes")
    first = losses["open_clip"]
    assert all(loss == pytest.approx(first, rel=0.02) for loss in losses.values()), losses
    assert other != pytest.approx(first, rel=1e-6)


def test_accumulating_gives_the_gradient_of_the_whole_batch(kit, case, monkeypatch):
    """By the losses of the steps that follow from it; in fp32, as bf16 rounds by the processor."""
    monkeypatch.setattr(torch, "autocast", lambda device, dtype: nullcontext())
    whole, parts = (
        kit.gpu_subjects.open_clip_step(case, accumulating=accumulating)
        for accumulating in (False, True)
    )
    for _ in range(4):
        assert parts() == pytest.approx(whole(), rel=1e-4)


def test_flops_are_those_that_torch_counts(kit):
    """Forward and backward of OpenCLIP's towers in plain attention, and its loss."""
    model_cfg, pairs = kit.gpu.TINY, 4
    model = reference.build_model(model_cfg).train()
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        images, texts, scale = model(image_batch(model_cfg, pairs), token_batch(model_cfg, pairs))
        # One block of logits for both directions, as the formula has it; OpenCLIP makes two.
        logits = scale * images @ texts.t()
        logits.logsumexp(1).sum().backward()
    wanted = kit.gpu_measure.flops_per_pair(architecture_from_json(model_cfg, "tiny"), pairs)
    assert counter.get_total_flops() == pairs * wanted


def out_of_memory(case):
    raise torch.OutOfMemoryError("CUDA out of memory")


def no_kernel(case):
    raise RuntimeError("no kernel image\nis available")


def test_what_fails_is_a_row_and_not_the_end(kit, case):
    subject, measure = kit.gpu_subjects.Subject, kit.gpu_measure.measure
    good = subject("good", lambda case: lambda: 1.5)
    row = measure(subject("large", out_of_memory), good, case, 3)
    assert (row.failed, row.seconds) == ("out of memory", [])
    row = measure(subject("new", no_kernel), good, case, 3)
    assert row.failed == "RuntimeError: no kernel image"
    # No room for the partner beside it: timed alone.
    row = measure(good, subject("large", out_of_memory), case, 3)
    assert (row.failed, len(row.seconds), row.partner_seconds, row.ratio) == (None, 3, [], None)


def test_a_profile_that_fails_leaves_the_times(kit, case, monkeypatch):
    monkeypatch.setattr(kit.gpu_measure, "profile_steps", no_kernel)
    good = kit.gpu_subjects.Subject("good", lambda case: lambda: 1.5, True)
    row = kit.gpu_measure.measure(good, good, case, 3)
    assert (row.failed, len(row.seconds), row.profile) == (None, 3, None)
    assert row.profile_failed == "RuntimeError: no kernel image"


def test_memory_that_runs_out_in_company_is_tried_again_alone(kit, case):
    calls = []

    def fails_at_its_first_timed_step():
        calls.append("step")
        if len(calls) == 5:  # three to warm up, one for the peak
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 1.0

    subject = kit.gpu_subjects.Subject
    tight = subject("tight", lambda case: fails_at_its_first_timed_step)
    row = kit.gpu_measure.measure(tight, subject("good", lambda case: lambda: 1.0), case, 3)
    assert (row.failed, len(row.seconds), row.partner_seconds) == (None, 3, [])


def test_idle_share_is_what_no_stream_covers(kit):
    idle_share = kit.gpu_profile.idle_share
    assert idle_share([]) is None
    assert idle_share([(0, 4), (6, 10)]) == pytest.approx(0.2)
    assert idle_share([(6, 10), (0, 7), (1, 2)]) == 0  # overlapping streams, in any order


def test_a_trace_is_summed_up_by_step(kit):
    def event(cat, name, ts, dur):
        return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur}

    events = [
        event("user_annotation", kit.gpu_profile.STEP_LABEL, 0, 100),
        event("gpu_user_annotation", "Optimizer.step", 0, 300),  # lies on the GPU, is no work
        event("kernel", "gemm", 10, 60),
        event("gpu_memcpy", "Memcpy DtoH", 80, 20),
        event("kernel", "gemm", 100, 10),
        event("cuda_runtime", "cudaStreamSynchronize", 50, 10),
        event("cuda_runtime", "cudaLaunchKernel", 60, 10),
        event("cuda_runtime", "cudaDeviceSynchronize", 150, 10),  # after the step
        {"ph": "i", "cat": "kernel", "name": "instant", "ts": 0},
    ]
    profile = kit.gpu_profile.summarize(events, steps=1)
    assert profile.idle_share == pytest.approx(0.1)
    assert profile.host_syncs == 1
    top = [(kernel.name, kernel.milliseconds, kernel.calls) for kernel in profile.top]
    assert top == [("gemm", 0.07, 2), ("Memcpy DtoH", 0.02, 1)]
