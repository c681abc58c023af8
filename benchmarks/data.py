"""Samples per second of the loader beside OpenCLIP's, where its time goes, and its memory.

    python benchmarks/data.py [--rounds 7] [--quick]

1. The same shards of JPEGs (about 500 x 375 pixels), the same transform, captions tokenized, by the
   same number of workers: OpenCLIP's own `get_wds_dataset`, and ours, whose order is exact, each
   once in every round, in turn; ratios are of the same round. `decode: fast` is shown beside them.
   OpenCLIP's training package needs `pip install pandas`.
2. Microseconds a sample takes in one process, part by part.
3. Resident memory of trainer and workers over 50 epochs.

What a web-scale data set costs is in `data_scale.py`.

Prints tables, writes JSON and a picture to benchmarks/results; exit code 1 where ours is slower.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import sys
import tarfile
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import psutil
import torch
from common import describe, environment, write_results
from data_scale import in_new_process
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console
from rich.table import Table

from parallel_clip.config import config_from_dict
from parallel_clip.data.feeding.loader import RankBatchSlice, TrainingLoader
from parallel_clip.data.feeding.open import build_training_data
from parallel_clip.data.feeding.run_shards import find_run_shards
from parallel_clip.data.feeding.training_data import TrainingData
from parallel_clip.data.samples.captions import CaptionRule
from parallel_clip.data.samples.decode import decode_picture
from parallel_clip.data.samples.tokenizer import ClipTokenizer
from parallel_clip.data.samples.transforms import (
    Preprocess,
    sample_seed,
    seeded,
    training_transform,
)
from parallel_clip.data.storage.progress import print_nothing
from parallel_clip.data.storage.shards import ShardFiles

BATCH = 64
SIZE = 224
PREPROCESS = Preprocess((SIZE, SIZE))
EPOCHS = 50


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="few samples, and prints only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=None if sys.stdout.isatty() else 110)
    with tempfile.TemporaryDirectory() as folder:
        shards = make_shards(Path(folder) / "shards", 8, 64 if options.quick else 160)
        small = make_shards(Path(folder) / "small", 2, 64)
        results: dict[str, Any] = {"environment": environment(), "batch": BATCH}
        results["speed"] = [
            measure_speed(shards, workers, 2 if options.quick else options.rounds)
            for workers in (1, 2)
        ]
        results["parts"] = measure_parts(open_data(shards))
        results["memory"] = measure_memory(small, 3 if options.quick else EPOCHS)
    print_results(console, results)
    if not options.quick:
        for path in write_results("data", results, draw(results)):
            print(path)
    return int(any(speed["ratio"] < 1 for speed in results["speed"]))


# -------------------------------------------------------------------------------------- subjects


def make_shards(folder: Path, shards: int, samples: int) -> str:
    """Pictures with the spectrum of photographs, as img2dataset lays them out; a pattern."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number in range(samples):
                key = f"{shard:05d}{number:04d}"
                caption = f"a photo of subject {number} beside subject {random.integers(1000)}"
                for kind, data in (
                    ("jpg", photograph(random)),
                    ("json", json.dumps({"caption": caption, "key": key}).encode()),
                    ("txt", caption.encode()),
                ):
                    member = tarfile.TarInfo(f"{key}.{kind}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return f"{folder}/{{00000..{shards - 1:05d}}}.tar"


def photograph(random: np.random.Generator) -> bytes:
    height, width = 375, 500
    down, across = np.meshgrid(np.fft.fftfreq(height), np.fft.fftfreq(width), indexing="ij")
    falling = 1 / np.maximum(np.hypot(down, across), 1 / width)
    noise = np.fft.fft2(random.standard_normal((3, height, width))) * falling
    pixels = np.fft.ifft2(noise).real
    pixels = 128 + 55 * (pixels - pixels.mean()) / pixels.std()
    buffer = io.BytesIO()
    picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))
    picture.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def open_data(shards: str, decode: str = "exact") -> TrainingData:
    config = config_from_dict(
        {"train": {"steps": 1}, "data": {"train": [{"shards": shards}], "decode": decode}}
    )
    found = find_run_shards(config, print_nothing)
    found.save_index(print_nothing)
    return build_training_data(config, found, PREPROCESS, ClipTokenizer(77))


def our_batches(shards: str, workers: int, decode: str) -> Iterator[int]:
    """Of one epoch: samples in each batch."""
    data = open_data(shards, decode)
    steps = data.order.orders[0].samples_per_epoch // BATCH
    for microbatches in TrainingLoader(
        data, RankBatchSlice(BATCH, BATCH), 0, steps, workers=workers
    ):
        yield sum(len(microbatch.images) for microbatch in microbatches)


def their_batches(shards: str, workers: int) -> Iterator[int]:
    import open_clip

    samples = open_data(shards).order.orders[0].samples_per_epoch
    options = Namespace(
        train_data=shards,
        train_num_samples=samples,
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        seed=0,
        workers=workers,
        world_size=1,
        batch_size=BATCH,
    )
    transform = open_clip.image_transform(SIZE, is_train=True)
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    found = openclip_data().get_wds_dataset(
        options, transform, is_train=True, floor=True, tokenizer=tokenizer
    )
    for images, _ in found.dataloader:
        yield len(images)


@cache
def openclip_data() -> ModuleType:
    """OpenCLIP's module. webdataset 1.x puts marks of a shard's end among its files, which OpenCLIP
    does not expect: they are left out for it."""
    import open_clip_train.data as theirs

    expand = theirs.tar_file_expander
    theirs.tar_file_expander = lambda *streams, **options: (
        file for file in expand(*streams, **options) if "fname" in file
    )
    return theirs


# ------------------------------------------------------------------------------------- measuring


def measure_speed(shards: str, workers: int, rounds: int) -> dict[str, Any]:
    """Samples a second of each, medians of rounds, and the ratio of ours to theirs."""
    subjects: dict[str, Callable[[], Iterator[int]]] = {
        "open_clip": lambda: their_batches(shards, workers),
        "ours": lambda: our_batches(shards, workers, "exact"),
        "ours, decode: fast": lambda: our_batches(shards, workers, "fast"),
    }
    found: dict[str, list[float]] = {name: [] for name in subjects}
    for number in range(-1, rounds):
        for name, batches in subjects.items():
            rate = samples_per_second(batches(), skip=workers)
            if number >= 0:  # the first round warms up
                found[name].append(rate)
    ratios = [a / b for a, b in zip(found["ours"], found["open_clip"], strict=True)]
    return {
        "workers": workers,
        "samples_per_second": {name: statistics.median(rates) for name, rates in found.items()},
        "ratio": statistics.median(ratios),
        "ratios": ratios,
    }


def samples_per_second(batches: Iterator[int], skip: int) -> float:
    """From the `skip`-th batch on, when all workers are at it."""
    for _ in range(skip):
        next(batches)
    began, samples, last = time.perf_counter(), 0, 0.0
    for count in batches:
        samples += count
        last = time.perf_counter()
    return samples / (last - began)


def measure_parts(data: TrainingData, samples: int = 256) -> dict[str, float]:
    """Microseconds a sample, in one process."""
    transform, tokenizer = training_transform(PREPROCESS, {}), ClipTokenizer(77)
    files, spent = ShardFiles(), dict.fromkeys(
        ("order", "read", "decode", "augment", "tokenize", "stack"), 0.0
    )  # fmt: skip

    def timed(part: str, work: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        result = work()
        spent[part] += (time.perf_counter() - began) / samples * 1e6
        return result

    positions = np.arange(samples)
    found = timed("order", lambda: data.order.of_positions(positions))
    images, captions = [], []
    for position, (_, shard, index, _) in enumerate(zip(*found, strict=True)):
        table = data.sources[0][int(shard)]
        sample = timed("read", lambda table=table, i=int(index): files.read(table, i))
        picture = timed("decode", lambda sample=sample: decode_picture(sample))

        def augment(position: int = position, picture: Image.Image = picture) -> torch.Tensor:
            with seeded(sample_seed(0, position, "augment")):
                return transform(picture)

        images.append(timed("augment", augment))
        captions.append(CaptionRule().captions_of(sample)[0])
    timed("tokenize", lambda: tokenizer(captions))
    timed("stack", lambda: torch.stack(images))
    return spent


def measure_memory(shards: str, epochs: int) -> list[float]:
    """MiB of a trainer and its worker, resident, at the end of each epoch; in a new process."""
    return in_new_process(_measure_memory, shards, epochs)


def _measure_memory(shards: str, epochs: int) -> list[float]:
    data = open_data(shards)
    steps_per_epoch = data.order.orders[0].samples_per_epoch // BATCH
    loader = TrainingLoader(
        data, RankBatchSlice(BATCH, BATCH), 0, epochs * steps_per_epoch, workers=1, patience=600
    )
    resident, process = [], psutil.Process(os.getpid())
    for step, _ in enumerate(loader, 1):
        if step % steps_per_epoch == 0:
            held = [process, *process.children(recursive=True)]
            resident.append(sum(each.memory_info().rss for each in held) / 2**20)
    return resident


# ------------------------------------------------------------------------------------- reporting


def print_results(console: Console, results: dict[str, Any]) -> None:
    table = Table("workers", *results["speed"][0]["samples_per_second"], "ours / open_clip",
                  title="samples a second, medians", title_justify="left")  # fmt: skip
    for speed in results["speed"]:
        rates = [f"{rate:.0f}" for rate in speed["samples_per_second"].values()]
        table.add_row(str(speed["workers"]), *rates, f"{speed['ratio']:.3f}")
    console.print(table)
    table = Table(*results["parts"], title="microseconds a sample", title_justify="left")
    table.add_row(*(f"{spent:.0f}" for spent in results["parts"].values()))
    console.print(table)
    memory = results["memory"]
    tenth = len(memory) // 10
    console.print(
        f"resident memory: {memory[tenth]:.0f} MiB after epoch {tenth + 1}, {memory[-1]:.0f} after "
        f"epoch {len(memory)}"
    )
    console.print(describe(results["environment"]), style="dim", highlight=False)


def draw(results: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(13, 4.2))
    speed, parts, memory = figure.subplots(1, 3)
    names = list(results["speed"][0]["samples_per_second"])
    for number, name in enumerate(names):
        places = [row + 0.26 * (number - 1) for row in range(len(results["speed"]))]
        rates = [row["samples_per_second"][name] for row in results["speed"]]
        speed.bar(places, rates, 0.25, label=name)
    speed.set_xticks(range(len(results["speed"])), [f"{row['workers']} workers"
                                                    for row in results["speed"]])  # fmt: skip
    speed.set_title("samples a second", fontsize=10)
    speed.legend(fontsize=7)
    parts.barh(list(results["parts"]), list(results["parts"].values()))
    parts.set_title("microseconds a sample", fontsize=10)
    memory.plot(range(1, len(results["memory"]) + 1), results["memory"])
    memory.set_ylim(0, 1.3 * max(results["memory"]))
    memory.set_title("MiB resident, trainer and worker, by epoch", fontsize=10)
    figure.tight_layout()
    figure.text(0.12, -0.04, describe(results["environment"]), fontsize=7, color="grey")
    return figure


if __name__ == "__main__":
    sys.exit(main())
