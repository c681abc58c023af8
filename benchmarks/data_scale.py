"""What opening a web-scale data set costs: an index whose file is sparse, for shards that are not
there."""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from parallel_clip.data.feeding.loader import RankBatchSlice
from parallel_clip.data.index.index_file import FORMAT
from parallel_clip.data.index.index_folder import INDEX_NAME
from parallel_clip.data.index.shard_table import find_checked_shards, find_shards
from parallel_clip.data.order.sample_order import Order, OrderSource
from parallel_clip.data.storage.progress import print_nothing

SAMPLES = 10_000  # of a shard
SHARD_BYTES = 512 * 30 * SAMPLES
RANKS, GLOBAL_BATCH = 1024, 32_768


def measure_scale(folder: Path, shards: int) -> dict[str, Any]:
    """Seconds and MiB in a new process, as rank 0 and as another rank."""
    folder.mkdir()
    write_sparse_index(folder / INDEX_NAME, shards)
    for number in range(shards):
        with open(folder / f"{number:06d}.tar", "wb") as file:
            file.truncate(SHARD_BYTES)
    pattern = f"{folder}/{{000000..{shards - 1:06d}}}.tar"
    opened = {}
    for who, check in (("rank 0, which looks at each", True), ("another rank", False)):
        opened[who] = in_new_process(_open, pattern, check)
    return {"shards": shards, "samples": shards * SAMPLES, "ranks": RANKS, "opened": opened}


def in_new_process(work: Callable[..., Any], *arguments: Any) -> Any:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(work, *arguments).result()


def _open(pattern: str, check: bool) -> dict[str, float]:
    process = psutil.Process()
    before, began = process.memory_info().rss, time.perf_counter()
    table = (find_checked_shards if check else find_shards)(pattern, print_nothing)
    order = Order([OrderSource(table.counts)], 0, GLOBAL_BATCH)
    for step in (0, 1000):
        (positions,) = RankBatchSlice(
            GLOBAL_BATCH, GLOBAL_BATCH // RANKS, RANKS - 1, RANKS
        ).microbatches(step)
        found = order.of_positions(np.arange(positions.start, positions.stop))
        assert found.shard.max() < len(table)
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "mebibytes": (process.memory_info().rss - before) / 2**20}


def write_sparse_index(path: Path, shards: int) -> None:
    """The tables of an index; what stands behind them is left a hole."""
    samples = shards * SAMPLES
    names = b"\n".join(b"%06d.tar" % number for number in range(shards))
    parts = [
        ("bytes", "I64", 8, np.full(shards, SHARD_BYTES).tobytes(), shards),
        ("changed_ns", "I64", 8, bytes(8 * shards), shards),
        ("samples", "I64", 8, np.full(shards, SAMPLES).tobytes(), shards),
        ("checksums", "U32", 4, bytes(4 * shards), shards),
        ("names", "U8", 1, names, len(names)),
        ("bounds", "U32", 4, b"", samples + shards),
        ("headers", "U32", 4, b"", samples),
    ]
    header: dict[str, Any] = {"__metadata__": {"format": FORMAT}}
    place = 0
    for name, kind, size, _, length in parts:
        header[name] = {
            "dtype": kind,
            "shape": [length],
            "data_offsets": [place, place + size * length],
        }
        place += size * length
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for *_, data, _ in parts:
            file.write(data)
        file.truncate(8 + len(text) + place)
