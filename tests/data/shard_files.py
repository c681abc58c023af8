"""Small shards for tests: samples in, tar out."""

import io
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from parallel_clip.data.index.shard_table import ShardTable, find_checked_shards, save_index
from parallel_clip.data.storage.shards import ShardFiles, ShardIndex, StoredSample

Files = Mapping[str, bytes]


def picture(number: int, size: tuple[int, int] = (24, 18), kind: str = "JPEG") -> bytes:
    """An encoded picture of `size` (width, height), different for each number."""
    pixels = np.random.default_rng(number).integers(0, 255, (size[1], size[0], 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def sample(number: int) -> Files:
    return {"jpg": picture(number), "txt": f"picture number {number}".encode()}


def write_shard(path: Path, samples: Mapping[str, Files], **options) -> Path:
    """Write {key: {extension: contents}} as a tar."""
    with tarfile.open(path, "w", **options) as tar:
        for key, files in samples.items():
            for extension, contents in files.items():
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(contents)
                tar.addfile(member, io.BytesIO(contents))
    return path


def write_shards(folder: Path, counts: Sequence[int]) -> list[Path]:
    """Shards 000000.tar, ... of so many samples, keys and pictures numbered through."""
    folder.mkdir(parents=True, exist_ok=True)
    paths, first = [], 0
    for shard, count in enumerate(counts):
        samples = {f"{number:05d}": sample(number) for number in range(first, first + count)}
        paths.append(write_shard(folder / f"{shard:06d}.tar", samples))
        first += count
    return paths


def index_shards(patterns: str | Sequence[str], say=lambda line: None) -> ShardTable:
    """Find and check shards, and save their index, as a command does."""
    table = find_checked_shards(patterns, say)
    save_index(table, say)
    return table


def read_all(shards: Sequence[ShardIndex], files: ShardFiles | None = None) -> list[StoredSample]:
    """All samples of shards, in their order."""
    files = files or ShardFiles()
    return [files.read(shard, index) for shard in shards for index in range(shard.samples)]
