"""A model, captioned pictures and a config small enough that a command on them takes seconds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from safetensors import safe_open

MODEL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "layers": 2, "width": 32, "head_width": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 2},
}
SAMPLES = 40


def make_world(folder: Path) -> Path:
    """Writes `model.json`, `config.yaml` and shards of `SAMPLES` pairs; returns the config.

    A run of it is 6 steps of 8 pairs, over 5 of which the shards go, in fp32.
    """
    from tests.reference import make_shards

    (folder / "model.json").write_text(json.dumps(MODEL))
    config = {
        "model": {"name": str(folder / "model.json")},
        "batch": {"global": 8, "micro": 4},
        "precision": "fp32",
        "train": {"steps": 6},
        "optimizer": {"lr": 1e-3},
        "schedule": {"warmup": 2},
        "data": {
            "train": [{"shards": make_shards(folder / "train", SAMPLES, 32, seed=0)}],
            "workers": 0,
        },
        # No test depends on what else fills the machine; a prediction costs a quarter of a second.
        "plan": {"check": "off"},
        "log": {"every": 1, "ledger": True},
        "checkpoint": {"every": 2, "keep": None},
        "run_dir": str(folder / "run"),
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def one_batch_config(folder: Path) -> dict[str, Any]:
    """The config of `make_world` in `folder`, with a batch of all of its data as they are, nothing
    saved on the way, and no `model`."""
    config = yaml.safe_load(make_world(folder).read_text())
    del config["model"]
    config |= {"batch": {"global": SAMPLES, "micro": SAMPLES // 2}, "checkpoint": {"every": 0}}
    config["data"] |= {"augment": "none"}
    return config


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def metrics(run: Path) -> list[dict[str, Any]]:
    return lines(run / "metrics.jsonl")


def status(run: Path) -> dict[str, Any]:
    return json.loads((run / "status.json").read_text())


def ledger(run: Path) -> list[tuple[int, int, str, str]]:
    """(step, position, shard, key) of all ranks, in the order of positions."""
    found = [line for file in (run / "ledger").glob("*.jsonl") for line in lines(file)]
    found.sort(key=lambda line: line["position"])
    return [(s["step"], s["position"], Path(s["shard"]).name, s["key"]) for s in found]


def tensors(folder: Path) -> dict[str, bytes]:
    """The bytes of every tensor in the safetensors files of a folder."""
    return dict(_tensors(folder))


def _tensors(folder: Path) -> Iterator[tuple[str, bytes]]:
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="np") as opened:
            for name in opened.keys():
                yield name, opened.get_tensor(name).tobytes()


def state_of(folder: Path) -> dict[str, tuple[int, bytes]]:
    """What lies in a folder: time of change and contents of each file."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(f.relative_to(folder)): (f.stat().st_mtime_ns, f.read_bytes()) for f in files}
