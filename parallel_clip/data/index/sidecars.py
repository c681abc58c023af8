"""How many samples each shard has, from files that other tools leave beside them: OpenCLIP's
`sizes.json`, and img2dataset's `00000_stats.json` or `00000.parquet` of each shard."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from parallel_clip.data.storage.addresses import file_system, is_remote, request
from parallel_clip.data.storage.files import parent_and_name
from parallel_clip.errors import InputError

SIZES_NAME = "sizes.json"  # the samples of each shard, by file name
_THREADS = 16


def read_sizes(folder: str) -> dict[str, int]:
    """The counts of the `sizes.json` in a folder, by file name; none where it is not there.
    InputError: it is damaged."""
    file = f"{folder}/{SIZES_NAME}"
    data = _read(file)
    if data is None or is_remote(file) and not data.lstrip().startswith(b"{"):
        return {}  # some servers send a page of theirs for what is not there
    try:
        return {str(name): int(count) for name, count in json.loads(data).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{file} is not a table of counts by shard: {error}") from None


def counts_of_img2dataset(shards: Iterable[str]) -> list[int | None]:
    """The count of each shard that one of img2dataset's files beside it has."""
    with ThreadPoolExecutor(_THREADS) as threads:
        return list(threads.map(_count_of, shards))


def _count_of(shard: str) -> int | None:
    parent, name = parent_and_name(shard)
    stem = f"{parent}/{name.removesuffix('.tar')}"
    data = _read(f"{stem}_stats.json")
    if data is not None:
        with suppress(ValueError, KeyError, TypeError):
            return int(json.loads(data)["successes"])
    try:
        from pyarrow import parquet
    except ImportError:
        return None
    data = _read(f"{stem}.parquet")
    if data is None:
        return None
    try:  # a row for each picture that was tried
        status = parquet.read_table(io.BytesIO(data), columns=["status"])["status"]
        return status.to_pylist().count("success")
    except Exception:  # pyarrow's own kinds; a table of something else
        return None


def _read(file: str) -> bytes | None:
    try:
        if not is_remote(file):
            return Path(file).read_bytes()
        system, path = file_system(file)
        return request(file, lambda: system.cat_file(path))
    except OSError:
        return None
