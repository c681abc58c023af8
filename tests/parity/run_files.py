"""The files that a run begins with and leaves behind."""

import json
from pathlib import Path
from typing import Any

import yaml


def write_config(path: Path, config: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(config))
    return path


def read_metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def read_ledger(run: Path) -> list[dict[str, Any]]:
    """What each sample of each step was: step (from 1), position, source, shard, key."""
    lines = [
        line for path in (run / "ledger").glob("*.jsonl") for line in path.read_text().splitlines()
    ]
    return [json.loads(line) for line in lines]
