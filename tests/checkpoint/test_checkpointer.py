"""Checkpoints of real runs: any layout to any other to the last bit."""

from collections.abc import Collection

import pytest
import torch

from parallel_clip.checkpoint import commit
from parallel_clip.checkpoint.pieces import PieceReader
from parallel_clip.layout import Layout
from parallel_clip.model.architecture import parameter_table
from parallel_clip.model.openclip_json import architecture_from_json
from tests import reference
from tests.checkpoint.checkpoint_cases import (
    collect_and_go_on,
    interrupt,
    load_and_save,
    save_many,
    train_and_save,
)
from tests.ranks import copies, whole_tensors
from tests.small_models import distance, image_batch, small_model, token_batch
from tests.training.step_cases import Task

STEPS, BATCH = 3, 8
MODEL = small_model({"ls_init_value": 0.3})  # its vocabulary of 101 is padded at tensor 2 and 4
TABLE = parameter_table(architecture_from_json(MODEL, "small"))
KINDS = ("weight", "exp_avg", "exp_avg_sq")
WITHOUT_AVERAGES = {"one", "data2-whole", "pipeline3"}

LAYOUTS = {
    # name: layout, precision, ZeRO-1
    "one": (Layout(1), "fp32", True),
    "data2-zero": (Layout(2), "fp32", True),
    "data2-whole": (Layout(2), "fp32", False),
    "tensor2-sequence": (Layout(2, tensor=2, sequence=True), "fp32", True),
    "data2-tensor2-zero": (Layout(4, tensor=2), "fp32", True),
    "tensor4-whole": (Layout(4, tensor=4, sequence=True), "fp32", False),
    "tensor3-padded": (Layout(3, tensor=3, sequence=True), "fp32", True),  # 4 heads
    "data2-tensor2-bf16": (Layout(4, tensor=2, sequence=True), "bf16", True),
    "data2-whole-bf16": (Layout(2), "bf16", False),
    "pipeline3": (Layout(3, pipeline=3), "fp32", True),
    "data2-pipeline2-virtual2-bf16": (
        Layout(4, pipeline=2, virtual_pipeline=2), "bf16", True
    ),
}  # fmt: skip


def often(*names: str, of: Collection[str] = LAYOUTS) -> list:
    """All layouts, of which these are always tried."""
    assert {*names} <= {*of}
    return [n if n in names else pytest.param(n, marks=pytest.mark.long) for n in sorted(of)]


def task(name: str) -> Task:
    _, precision, zero = LAYOUTS[name]
    parallel = {"distributed_optimizer": zero, "pad": name.endswith("padded")}
    settings = {"precision": precision, "parallel": parallel}
    if name not in WITHOUT_AVERAGES:
        settings["ema"] = {"decay": 0.5, "every": 2}
    images, tokens = image_batch(MODEL, BATCH), token_batch(MODEL, BATCH)
    return Task(MODEL, reference.random_weights(MODEL, seed=3), images, tokens, settings)


def keys(name: str) -> set[str]:
    kinds = KINDS if name in WITHOUT_AVERAGES else (*KINDS, "ema")
    return {f"{kind}:{p.name}" for kind in kinds for p in TABLE}


def whole_model(layout: Layout, ranks: list[dict]) -> dict[str, torch.Tensor]:
    """Full tensors by name from what the ranks hold; the same on every data-parallel rank."""
    models = [whole_tensors(TABLE, of_copy) for of_copy in copies(layout, ranks)]
    for other in models[1:]:
        assert all(torch.equal(other[name], models[0][name]) for name in other)
    return models[0]


def read_all(folder) -> dict[str, torch.Tensor]:
    reader = PieceReader(folder)
    return {key: reader.read(key) for key in reader.keys()}


@pytest.fixture(scope="module")
def saved(processes, tmp_path_factory):
    """A checkpoint after three steps of each layout: folder, and the model's own tensors."""
    checkpoints = {}
    for name, (layout, _, _) in LAYOUTS.items():
        run_dir = tmp_path_factory.mktemp(name)
        ranks = processes.run(layout, train_and_save, task=task(name), steps=STEPS, run_dir=run_dir)
        checkpoints[name] = commit.latest(run_dir), whole_model(layout, ranks)
    return checkpoints


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_checkpoint_holds_the_model(saved, name):
    folder, model = saved[name]
    content = read_all(folder)
    assert content.keys() == keys(name)
    for parameter in TABLE:
        weight = content[f"weight:{parameter.name}"]
        assert weight.dtype == torch.float32 and weight.shape == parameter.shape
        assert torch.equal(weight.to(model[parameter.name].dtype), model[parameter.name])


@pytest.mark.parametrize("name", [n for n, (_, p, _) in LAYOUTS.items() if p == "fp32"])
def test_its_moments_are_torchs(saved, name):
    """Against AdamW around OpenCLIP's model, in one process."""
    given = task(name)
    model = reference.build_model(MODEL)
    model.load_state_dict(given.weights)
    decayed = {n: p for n, p in model.named_parameters() if reference.decayed(n, p)}
    others = [p for n, p in model.named_parameters() if n not in decayed]
    optimizer = torch.optim.AdamW(
        [{"params": decayed.values()}, {"params": others, "weight_decay": 0.0}],
        lr=1e-3, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2,
    )  # fmt: skip
    loss = reference.ClipLoss()
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss(*model(given.images, given.tokens)).backward()
        optimizer.step()
    content = read_all(saved[name][0])
    for parameter_name, parameter in model.named_parameters():
        for kind in ("exp_avg", "exp_avg_sq"):
            theirs = optimizer.state[parameter][kind]
            assert distance(content[f"{kind}:{parameter_name}"], theirs) < 1e-3, parameter_name


@pytest.mark.parametrize("name", often("data2-zero", of=LAYOUTS.keys() - WITHOUT_AVERAGES))
def test_its_averages_are_those_of_the_weights(saved, processes, name, tmp_path):
    """Of three steps with an update of the average after the second: halfway between the weights
    before the first step and those after the second."""
    layout = LAYOUTS[name][0]
    given = task(name)
    processes.run(layout, train_and_save, task=given, steps=2, run_dir=tmp_path / "run")
    second, content = read_all(commit.latest(tmp_path / "run")), read_all(saved[name][0])
    for parameter in TABLE:
        weight = second[f"weight:{parameter.name}"]
        expected = 0.5 * given.weights[parameter.name] + 0.5 * weight
        average = content[f"ema:{parameter.name}"]
        assert torch.allclose(average, expected, rtol=1e-6, atol=1e-8), parameter.name
        assert not torch.equal(average, weight) and not torch.equal(
            average, given.weights[parameter.name]
        )


@pytest.mark.parametrize(
    "target",
    often("one", "data2-zero", "tensor3-padded", "data2-tensor2-bf16", "pipeline3"),
)
def test_every_layout_loads_every_layouts_checkpoint(saved, processes, tmp_path, target):
    layout = LAYOUTS[target][0]
    ranks = processes.run(
        layout,
        load_and_save,
        task=task(target),
        sources={name: folder for name, (folder, _) in saved.items()},
        target=tmp_path,
    )
    for name, (folder, _) in saved.items():
        before, after = read_all(folder), read_all(commit.latest(tmp_path / name))
        assert after.keys() == keys(target)
        for key in after:
            # Averages that are not there start from the weights.
            expected = before.get(key, before[key.replace("ema:", "weight:")])
            assert torch.equal(expected, after[key]), (name, key)
        for parameter_name, tensor in whole_model(layout, [rank[name] for rank in ranks]).items():
            expected = before[f"weight:{parameter_name}"].to(tensor.dtype)
            assert torch.equal(tensor, expected), (name, parameter_name)


@pytest.mark.parametrize("name", often("data2-tensor2-zero", "data2-pipeline2-virtual2-bf16"))
def test_a_resumed_run_has_the_bits_of_one_without_a_break(processes, tmp_path, name):
    for records, expected, equal in processes.run(
        LAYOUTS[name][0], interrupt, task=task(name), run_dir=tmp_path
    ):
        assert records == expected
        assert equal


def test_collected_pieces_can_be_written_while_training_goes_on(processes):
    name = "data2-tensor2-zero"
    found = set()
    for pieces in processes.run(LAYOUTS[name][0], collect_and_go_on, task=task(name)):
        assert pieces and all(kept for _, kept, _ in pieces)
        assert any(changed for _, _, changed in pieces)
        found |= {key for key, _, _ in pieces}
    assert found == keys(name)


@pytest.mark.parametrize("saves", [30, pytest.param(500, marks=pytest.mark.long)])
def test_many_saves_leave_nothing_behind(processes, tmp_path, saves):
    name = "data2-tensor2-zero"
    run_dir = tmp_path / "run"
    for found in processes.run(
        LAYOUTS[name][0], save_many, task=task(name), saves=saves, run_dir=run_dir
    ):
        descriptors, threads, memory = zip(*found[3:], strict=True)
        # A shared process may lose what earlier tests left in it.
        assert descriptors[-1] <= descriptors[0] + 2 and threads[-1] <= threads[0] + 2, found
        assert memory[-1] < memory[0] + 30, found
    assert len(list((run_dir / "checkpoints").iterdir())) == 3
