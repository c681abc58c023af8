"""The promise: whatever the layout, a run is the plain single-process run of open_clip.

Each case trains from an OpenCLIP checkpoint with the `train` command, converts the result back with
`convert`, and compares every step and every weight with the reference. The data set is exactly one
global batch, so that each step sees the same samples, in an order to which loss and gradients are
blind. A covering set runs always; the whole grid with `pytest -m parity`.
"""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from parallel_clip.checkpoint import commit
from parallel_clip.checkpoint.pieces import PieceReader
from parallel_clip.model import kept_patches
from tests.launcher import succeed
from tests.parity.cases import COVERING, Case, grid
from tests.parity.models import MODELS
from tests.parity.run_files import read_ledger, read_metrics, write_config
from tests.parity.updates import UPDATES, groups_of
from tests.reference import (
    Batch,
    Reference,
    Sample,
    batch_from_shards,
    build_model,
    cosine,
    load_weights,
    lock_towers,
    make_checkpoint,
    make_shards,
    reference_run,
)

STEPS = 20
SEED = 5
WARMUP = 4
DECAY = 0.9  # of averages
OPTIMIZER = {"lr": 5e-4, "betas": [0.9, 0.98], "eps": 1e-6, "weight_decay": 0.2}


@dataclass(frozen=True)
class Setting:
    """What all cases of one model and batch share: a checkpoint, a data set, and the reference on
    it."""

    model: str
    checkpoint: Path
    shards: str
    weights: dict[str, torch.Tensor]
    batch: Batch

    def reference(self, case: Case, precision: str, kept=None) -> Reference:
        optimizer = {key: value for key, value in OPTIMIZER.items() if key != "lr"}
        if case.updates is not None:
            optimizer["groups_of"] = groups_of(UPDATES[case.updates], OPTIMIZER["lr"])
        return reference_run(
            MODELS[self.model],
            self.weights,
            self.batch,
            steps=STEPS,
            learning_rate=cosine(OPTIMIZER["lr"], WARMUP, STEPS),
            clip_grad_norm=case.clip_grad_norm,
            loss=case.loss,
            kept_patches=kept,
            precision=precision,
            freeze=case.freeze,
            ema=(DECAY, case.ema_every) if case.ema_every else None,
            **optimizer,
        )


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    made: dict[tuple[str, int], Setting] = {}

    def get(case: Case) -> Setting:
        model, key = case.model, (case.model, case.batch)
        if key not in made:
            folder = tmp_path_factory.mktemp(model)
            weights = make_checkpoint(MODELS[model], seed=1, folder=folder / "checkpoint")
            shards = make_shards(folder / "shards", samples=case.batch, image_size=32, seed=2)
            batch = batch_from_shards(folder / "shards", folder / "checkpoint")
            made[key] = Setting(model, folder / "checkpoint", shards, weights, batch)
        return made[key]

    return get


@pytest.fixture(scope="module")
def reference(setting):
    """The reference of a case, trained once for all cases that share it."""
    trained: dict[tuple, Reference] = {}

    def get(case: Case, precision: str) -> Reference:
        key = (case.model, case.batch, case.clip_grad_norm, precision, case.updates)
        key = (*key, repr(case.freeze), case.ema_every)
        if key not in trained:
            trained[key] = setting(case).reference(case, precision)
        return trained[key]

    return get


def train(case: Case, setting: Setting, folder: Path) -> Path:
    """Runs the case by the `train` command; returns its run folder."""
    config = {
        "model": {"name": str(setting.checkpoint / "open_clip_config.json")},
        "init": {"from": str(setting.checkpoint)},
        "loss": case.loss_section,
        "parallel": case.parallel,
        "batch": {"global": case.batch, "micro": case.batch // case.data // case.microbatches},
        "precision": case.precision,
        "recompute": case.recompute,
        "train": {"steps": STEPS},
        "optimizer": OPTIMIZER
        | {"clip_grad_norm": case.clip_grad_norm}
        | UPDATES.get(case.updates, {}),
        "schedule": {"kind": "cosine", "warmup": WARMUP},
        "freeze": case.freeze or {},
        "ema": {"decay": DECAY, "every": case.ema_every} if case.ema_every else {},
        "data": {
            "train": [{"shards": setting.shards}],
            "augment": "none",
            "tokenizer": "openclip",
            "workers": 1,
        },
        "log": {"every": 1, "ledger": True},
        "seed": SEED,
    }
    if case.ema_every and case.precision == "bf16":
        config["checkpoint"] = {"every": 1, "keep": None}
    run = folder / "run"
    config_path = write_config(folder / "config.yaml", config)
    succeed("train", config_path, f"run_dir={run}", processes=case.processes)
    return run


def fed_patches(case: Case, run: Path, samples: list[Sample]):
    """What patch dropout kept, for the reference: step counted from 0 -> [B, keep].

    Rows are in the order of `samples`; the ledger says at which position each stood in each step.
    """
    positions = {
        (line["step"], Path(line["shard"]).name, line["key"]): line["position"]
        for line in read_ledger(run)
    }
    vision = MODELS[case.model]["vision_cfg"]
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    keep = int(patches * (1 - vision["patch_dropout"]))

    def kept(step: int) -> torch.Tensor:
        places = [positions[step + 1, sample.shard, sample.key] for sample in samples]
        rows = [kept_patches(SEED, step + 1, place, patches, keep) for place in places]
        return torch.stack([torch.as_tensor(row) for row in rows])

    return kept


def assert_same_steps(ours: list[dict], reference: Reference, batch: int) -> None:
    assert [line["step"] for line in ours] == list(range(1, STEPS + 1))
    for line, wanted in zip(ours, reference.steps, strict=True):
        tolerance = 1e-5 if line["step"] == 1 else 1e-4
        where = f"step {line['step']}"
        for key in ("loss", "grad_norm"):
            limit = max(tolerance * wanted[key], 1e-6 if wanted[key] < 0.01 else 0.0)
            assert abs(line[key] - wanted[key]) <= limit, (where, key, line[key], wanted[key])
        assert line["samples_seen"] == line["step"] * batch
        assert line["lr"] == pytest.approx(wanted["lr"], rel=1e-6), where
        assert line["logit_scale"] == pytest.approx(wanted["logit_scale"], rel=tolerance), where
        if wanted["logit_bias"] is None:
            assert line["logit_bias"] is None
        else:
            assert line["logit_bias"] == pytest.approx(wanted["logit_bias"], rel=tolerance), where


def assert_rates_of_parts(ours: list[dict], settings: dict) -> None:
    """Those that the config sets are in the metrics, and no others."""
    peaks = {key: peak for key, peak in settings.items() if key.startswith("lr_")}
    for line in ours:
        found = {key: value for key, value in line.items() if key.startswith("lr_")}
        share = line["lr"] / OPTIMIZER["lr"]
        assert found == {key: pytest.approx(peak * share) for key, peak in peaks.items()}


def without_key_bias(name: str, value: torch.Tensor, rotary: bool) -> torch.Tensor:
    """Drops the key part of a bias: softmax is blind to it where keys are not turned by their
    place; only rounding moves it."""
    if name.endswith("attn_pool.kv.bias"):
        return value.chunk(2)[1]
    image = name.startswith("visual.")
    if name.endswith(("in_proj_bias", "attn.qkv.bias")) and not (rotary and image):
        query, _, values = value.chunk(3)
        return torch.cat([query, values])
    return value


def far_from(ours: dict, wanted: dict) -> float:
    """The distance of all weights together, relative to their size."""
    off = torch.cat([(ours[n] - wanted[n]).double().flatten() for n in wanted]).norm()
    return (off / torch.cat([v.double().flatten() for v in wanted.values()]).norm()).item()


def assert_same_weights(ours: dict, wanted: dict, rotary: bool) -> None:
    assert {n: v.shape for n, v in ours.items()} == {n: v.shape for n, v in wanted.items()}
    names = sorted(wanted)
    assert far_from(ours, wanted) <= 1e-4
    far = {}
    for name in names:
        a, b = (without_key_bias(name, w[name].double(), rotary) for w in (ours, wanted))
        deviation = ((a - b).norm() / b.norm()).item()
        if deviation > 1e-4:
            far[name] = f"{deviation:.1e}"
    assert not far


def assert_average_of_own_weights(run: Path, weights: dict, every: int) -> None:
    """Of a run with a checkpoint after each step, which began from `weights`: its average by the
    definition, in fp64, from its fp32 masters; bf16 runs of open_clip have none."""
    readers = [PieceReader(folder) for folder in commit.step_folders(run)]
    assert len(readers) == STEPS
    for name, initial in weights.items():
        average = initial.double()
        for step, reader in enumerate(readers, 1):
            master = reader.read(f"weight:{name}")
            if step % every == 0:
                average = DECAY * average + (1 - DECAY) * master.double()
            held = reader.read(f"ema:{name}").double()
            assert torch.allclose(held, average, rtol=1e-6, atol=1e-7), (name, step)
        assert not torch.allclose(held, master.double(), rtol=1e-4), name


def assert_bf16_like_open_clip(ours: list[dict], case: Case, reference) -> None:
    """Off fp32 by at most 1.5 times what open_clip's own bf16 is, and a thousandth."""
    exact = [step["loss"] for step in reference(case, "fp32").steps]
    theirs = max(
        abs(step["loss"] - loss)
        for precision in ("amp_bf16", "pure_bf16")
        for step, loss in zip(reference(case, precision).steps, exact, strict=True)
    )
    for line, loss in zip(ours, exact, strict=True):
        assert abs(line["loss"] - loss) <= 1.5 * theirs + 1e-3 * loss, (line["step"], theirs)


@pytest.mark.parametrize(
    "case",
    [
        *(pytest.param(case, id=str(case)) for case in COVERING),
        *(pytest.param(case, id=str(case), marks=pytest.mark.parity) for case in grid()),
    ],
)
def test_a_run_is_open_clips(case, setting, reference, tmp_path):
    shared = setting(case)
    run = train(case, shared, tmp_path)
    metrics = read_metrics(run)
    if case.precision == "bf16":
        assert_bf16_like_open_clip(metrics, case, reference)
        if case.ema_every:
            assert_average_of_own_weights(run, shared.weights, case.ema_every)
        return

    if "patch_dropout" in MODELS[case.model]["vision_cfg"]:
        wanted = shared.reference(case, "fp32", fed_patches(case, run, shared.batch.samples))
    else:
        wanted = reference(case, "fp32")
    assert_same_steps(metrics, wanted, case.batch)
    assert_rates_of_parts(metrics, UPDATES.get(case.updates, {}))
    succeed("convert", run, tmp_path / "converted", "--to", "openclip")
    rotary = case.model == "timm-pe-core"
    weights = load_weights(tmp_path / "converted")
    assert_same_weights(weights, wanted.weights, rotary)
    for name in frozen_names(case):
        assert torch.equal(weights[name], shared.weights[name]), name
    if case.ema_every:
        succeed("convert", run, tmp_path / "averages", "--to", "openclip", "--ema")
        averages = load_weights(tmp_path / "averages")
        assert_same_weights(averages, wanted.averages, rotary)
        assert far_from(averages, wanted.weights) > 1e-3
        for name in frozen_names(case):
            assert torch.equal(averages[name], shared.weights[name]), name


def frozen_names(case: Case) -> list[str]:
    """What open_clip's own locking keeps from training."""
    model = build_model(MODELS[case.model])
    lock_towers(model, case.freeze or {})
    return [name for name, tensor in model.named_parameters() if not tensor.requires_grad]
