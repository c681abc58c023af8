"""What data of web scale cost: bytes that machines fetch, seconds until a run can begin, and what
an indexer that is killed has lost.

    python benchmarks/data_scale.py [--quick]

1. 5 million samples of 50 kB, pages of 1 MiB in a cache of 32 GB on each machine, filled in the
   order of a run: bytes fetched in an epoch beside the bytes of the samples read, for real batch
   sizes and some that divide by nothing, on 8 to 128 machines. Four machines are simulated of each.
2. 200,000 shards of 10,000 samples on 1,024 ranks: an index without the shards behind it (its file
   is sparse), opened as rank 0 does, which looks at every shard, and as the others do, with the
   first addresses that the last rank reads.
3. `data index` of 1,000 shards, killed when half of them are scanned: how many are lost.

Prints tables, writes JSON and a picture to benchmarks/results; exit code 1 where a machine fetches
more than 1.25 times its samples, or more shards are lost than were in hand.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from common import describe, environment, write_results
from matplotlib.figure import Figure
from page_simulation import SAMPLE_BYTES, fetched_of_read
from rich.console import Console
from rich.table import Table

from parallel_clip.data.feeding.loader import RankBatchSlice
from parallel_clip.data.index.beside import INDEX_NAME
from parallel_clip.data.index.index_file import FORMAT
from parallel_clip.data.index.shard_table import UNKNOWN, find_checked_shards, find_shards
from parallel_clip.data.order.reading import machine_reading
from parallel_clip.data.order.sample_order import Order, OrderSource
from parallel_clip.data.storage.pages import PAGE
from parallel_clip.data.storage.progress import print_nothing

SAMPLES = 10_000  # of a shard
SHARD_BYTES = 512 * 30 * SAMPLES
RANKS, GLOBAL_BATCH = 1024, 32_768

CACHE = 32 * 10**9
BATCHES = (4096, 32_768, 36_864, 65_536, 79_104, 159_744, 163_840, 10_000, 50_000, 100_001)
MACHINES = (8, 16, 24, 128)
MOST = 1.25
WORKERS = 2
# `data index`, which notes each shard that has been scanned.
INDEX = """
import os, sys
import parallel_clip.data.index.scan as scan
from parallel_clip.cli import main
original, log = scan.scan_headers, os.open(sys.argv.pop(), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
def noted(path):
    found = original(path)
    os.write(log, b".")
    return found
scan.scan_headers = noted
sys.exit(main(sys.argv[1:]))
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few of each, and prints only")
    quick = parser.parse_args().quick
    console = Console(width=None if sys.stdout.isatty() else 110)
    results: dict[str, Any] = {"environment": environment()}
    samples, batches = (500_000, BATCHES[:2]) if quick else (5_000_000, BATCHES)
    results["reading"] = [
        measure_reading(samples, batch, machines)
        for machines in (MACHINES[:1] if quick else MACHINES)
        for batch in batches
    ]
    with tempfile.TemporaryDirectory() as folder:
        results["scale"] = measure_scale(Path(folder) / "web", 2_000 if quick else 200_000)
        results["killed"] = measure_killed(Path(folder) / "killed", 60 if quick else 1000)
    print_results(console, results)
    if not quick:
        for path in write_results("data-scale", results, draw(results)):
            print(path)
    worst = max(found["fetched"] for found in results["reading"])
    return int(worst > MOST or results["killed"]["lost"] > results["killed"]["in_hand"])


# --------------------------------------------------------------------------------------- reading


def measure_reading(samples: int, batch: int, machines: int) -> dict[str, Any]:
    """Bytes fetched beside bytes read, a mean of four machines and their greatest."""
    order = Order([OrderSource([SAMPLES] * (samples // SAMPLES))], 1, batch)
    some = sorted({0, machines // 3, machines // 2, machines - 1})
    found = [
        fetched_of_read(order, machines, machine, shard=SAMPLES, page=PAGE, cache=CACHE)
        for machine in some
    ]
    told = machine_reading(samples, order.streams, SAMPLE_BYTES, machines, PAGE)
    return {
        "machines": machines,
        "batch": batch,
        "streams": order.streams,
        "fetched": sum(found) / len(found),
        "greatest": max(found),
        "told": told.fetched / told.own,
        "in_use_bytes": told.in_use,
    }


# ---------------------------------------------------------------------------------------- killed


def measure_killed(folder: Path, shards: int) -> dict[str, Any]:
    """Kill `data index` when half is scanned; how many of the scanned shards were not kept."""
    folder.mkdir()
    for number in range(shards):
        with tarfile.open(folder / f"{number:06d}.tar", "w") as tar:
            for sample in range(100):
                for kind in ("jpg", "txt"):
                    member = tarfile.TarInfo(f"{number:06d}{sample:04d}.{kind}")
                    member.size = 100
                    tar.addfile(member, io.BytesIO(bytes(100)))
    log = folder / "scanned"
    log.touch()
    command = ["data", "index", str(folder), "--workers", str(WORKERS)]
    indexer = subprocess.Popen(
        [sys.executable, "-c", INDEX, *command, str(log)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    while log.stat().st_size < shards // 2:
        if indexer.poll() is not None:
            sys.exit("data index ended before it could be killed")
        time.sleep(0.001)
    os.killpg(indexer.pid, signal.SIGKILL)
    indexer.wait()
    scanned, kept = log.stat().st_size, _indexed(folder)
    subprocess.run(
        [sys.executable, "-m", "parallel_clip", *command], check=True, stdout=subprocess.DEVNULL
    )
    if _indexed(folder) != shards:
        sys.exit("the next data index has not gone on where the killed one stopped")
    return {
        "shards": shards,
        "scanned": scanned,
        "kept": kept,
        "lost": scanned - kept,
        "in_hand": 2 * WORKERS,
    }


def _indexed(folder: Path) -> int:
    table = find_shards(str(folder), print_nothing)
    return int((table.counts != UNKNOWN).sum())


# ------------------------------------------------------------------------------------- start-up


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


# ------------------------------------------------------------------------------------- reporting


def print_results(console: Console, results: dict[str, Any]) -> None:
    table = Table("batch", title="bytes fetched beside bytes read, by machines (greatest of 4)",
                  title_justify="left")  # fmt: skip
    by_batch: dict[int, list[str]] = {}
    for found in results["reading"]:
        shown = f"{found['fetched']:.2f} ({found['greatest']:.2f})"
        by_batch.setdefault(found["batch"], []).append(shown)
    for machines in dict.fromkeys(found["machines"] for found in results["reading"]):
        table.add_column(str(machines), justify="right")
    for batch, row in by_batch.items():
        table.add_row(f"{batch:,}", *row)
    console.print(table)
    for who, found in results["scale"]["opened"].items():
        console.print(
            f"{results['scale']['shards']:,} shards, {results['scale']['samples']:,} samples, "
            f"{who}: {found['seconds']:.1f} s, {found['mebibytes']:.0f} MiB"
        )
    killed = results["killed"]
    console.print(
        f"data index of {killed['shards']:,} shards, killed when {killed['scanned']:,} were "
        f"scanned: {killed['kept']:,} kept"
    )
    console.print(describe(results["environment"]), style="dim", highlight=False)


def draw(results: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(9, 4.2))
    axes = figure.subplots()
    machines = list(dict.fromkeys(found["machines"] for found in results["reading"]))
    for number, count in enumerate(machines):
        rows = [found for found in results["reading"] if found["machines"] == count]
        places = [row + 0.2 * (number - 1.5) for row in range(len(rows))]
        axes.bar(places, [row["fetched"] for row in rows], 0.19, label=f"{count} machines")
    axes.set_xticks(range(len(rows)), [f"{row['batch']:,}" for row in rows], fontsize=7)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.axhline(MOST, color="grey", linewidth=0.8, linestyle="--")
    axes.set_ylim(0.8, 1.4)
    axes.set_xlabel("pairs in a batch")
    axes.set_title("bytes fetched in an epoch beside the bytes of the samples read", fontsize=10)
    axes.legend(fontsize=7, ncols=4)
    figure.tight_layout()
    figure.text(0.08, -0.03, describe(results["environment"]), fontsize=7, color="grey")
    return figure


if __name__ == "__main__":
    sys.exit(main())
