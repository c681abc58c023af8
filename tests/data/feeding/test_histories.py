"""Random histories of shards, indexes and pages: a run over them sees each sample exactly once, in
whatever layout it goes on, or is refused by a message that names a shard that was changed."""

import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from parallel_clip.config import Config, config_from_dict
from parallel_clip.data.feeding.loader import RankBatchSlice
from parallel_clip.data.feeding.run_shards import RunShards, find_run_shards, reopen_run_shards
from parallel_clip.data.index.beside import INDEX_NAME
from parallel_clip.data.index.renew import renew_index
from parallel_clip.data.index.shard_list import ListedShard, describe_differences
from parallel_clip.data.storage import addresses, pages
from parallel_clip.data.storage.addresses import StorageSettings, configure_storage
from parallel_clip.data.storage.progress import print_nothing
from parallel_clip.data.storage.shards import BadSampleError, ShardFiles
from parallel_clip.errors import InputError
from tests.data.http_server import serve
from tests.data.shard_files import picture, write_shard

BATCH = 6
WEIGHT = 2.0
encoded = lru_cache(4096)(lambda number: picture(number, (8, 6)))


class Refused(Exception):
    """With the message that the user sees."""


class Begun(NamedTuple):
    """What a checkpoint keeps of a run, and the samples seen before it."""

    step: int
    fingerprint: dict
    listed: list[ListedShard]
    seen: list[int]


class World:
    """A folder of shards; beside it a machine with a copy of its own, or a server at whose address
    all machines read the folder. What is done is drawn from `random`."""

    def __init__(self, folder: Path, dice: random.Random, address: str | None):
        self.dice, self.address = dice, address
        self.shared, self.copy, self.cache = folder / "shared", folder / "copy", folder / "cache"
        self.shared.mkdir()
        self.count = self.next = 0
        self.changed: set[str] = set()  # shards that are no longer what an index or a copy has
        self.stale: set[str] = set()  # of these, where neither size nor time may tell
        self.log: list[str] = []
        for _ in range(dice.randint(2, 4)):
            self.add()
        if address is None and dice.random() < 0.6:
            if dice.random() < 0.5:
                self.index()
            shutil.copytree(
                self.shared, self.copy, copy_function=dice.choice([shutil.copy, shutil.copy2])
            )

    # ----------------------------------------------------------------------- what people do

    def add(self) -> None:
        self._write(f"{self.count:06d}.tar")
        self.count += 1

    def remove(self) -> None:
        if len(self._names()) > 2:
            name = self._pick()
            (self.shared / name).unlink()
            self.changed.add(name)

    def exchange(self) -> None:
        """With other samples, most often as many bytes; sometimes with the old time of change."""
        name = self._pick()
        status = (self.shared / name).stat()
        self._write(name)
        # At an address the ETag, which has the time, is all there is to tell versions by.
        if self.address is None and self.dice.random() < 0.3:
            os.utime(self.shared / name, ns=(status.st_atime_ns, status.st_mtime_ns))
            self.stale.add(name)

    def swap(self) -> None:
        one, other = self.dice.sample(self._names(), 2)
        (self.shared / one).rename(self.shared / "x")
        (self.shared / other).rename(self.shared / one)
        (self.shared / "x").rename(self.shared / other)
        self.changed |= {one, other}

    def touch(self) -> None:
        if self.address is None:
            os.utime(self.shared / self._pick(), (1e9 + self.next, 1e9 + self.next))

    def truncate(self) -> None:
        name = self._pick()
        data = (self.shared / name).read_bytes()
        (self.shared / name).write_bytes(data[: self.dice.randrange(max(1, len(data) - 1024))])
        self.changed.add(name)

    def index(self) -> None:
        with suppress(InputError):  # the others are indexed
            renew_index(self._paths(self.shared), print_nothing)

    def index_elsewhere(self) -> None:
        if self.copy.exists():
            with suppress(InputError):
                renew_index(self._paths(self.copy), print_nothing)

    def copy_again(self) -> None:
        if self.copy.exists():
            shutil.rmtree(self.copy)
            shutil.copytree(self.shared, self.copy)

    def lose_the_index(self) -> None:
        (self.shared / INDEX_NAME).unlink(missing_ok=True)

    def spoil_pages(self) -> None:
        for page in sorted(self.cache.rglob(f"*.{pages.PAGE}")):
            if self.dice.random() < 0.4:
                data = bytearray(page.read_bytes())
                if self.dice.random() < 0.5:
                    page.write_bytes(data[: self.dice.randrange(len(data))])
                else:
                    data[self.dice.randrange(len(data))] ^= 1 << self.dice.randrange(8)
                    page.write_bytes(data)

    ACTIONS = (add, remove, exchange, swap, touch, truncate, index, index_elsewhere, copy_again,
               lose_the_index, spoil_pages)  # fmt: skip

    def live(self, times: int) -> None:
        for _ in range(times):
            action = self.dice.choice(self.ACTIONS)
            self.log.append(action.__name__)
            action(self)

    # ---------------------------------------------------------------------- what a run does

    def open(self) -> RunShards:
        """What rank 0 sees, once the first rank of the other machine sees the same."""
        try:
            shards = find_run_shards(self._config(self.shared), print_nothing)
            shards.save_index(print_nothing)
            if self.copy.exists():
                other = reopen_run_shards(self._config(self.copy), check=True)
                if other.fingerprint != shards.fingerprint:
                    raise InputError(describe_differences(shards.listed, other.listed))
        except InputError as error:
            raise Refused(str(error)) from None
        return shards

    def train(self, begun: Begun | None, steps: int | None) -> Begun:
        """Go on for some steps, or to the end of an epoch, in a random layout."""
        shards = self.open()
        first, seen = (begun.step, list(begun.seen)) if begun else (0, [])
        if begun and begun.fingerprint != shards.fingerprint:
            raise Refused(describe_differences(begun.listed, shards.listed))
        per_epoch = shards.orders[0].samples_per_epoch
        last = -(-per_epoch // BATCH) if steps is None else first + steps
        ranks = self.dice.choice([1, 2, 3, 6])
        views = [shards]
        if self.copy.exists():
            views.append(reopen_run_shards(self._config(self.copy)))
        files = ShardFiles()
        for step in range(first, last):
            for rank in range(ranks):
                view = views[rank % len(views)]
                slice_ = RankBatchSlice(BATCH, BATCH // ranks, rank, ranks)
                (positions,) = slice_.microbatches(step)
                positions = [p for p in positions if p < per_epoch]
                seen += self._read(view, positions, files)
        return Begun(last, shards.fingerprint, shards.listed, seen)

    def _read(self, shards: RunShards, positions: list[int], files: ShardFiles) -> list[int]:
        numbers = []
        found = shards.orders[0].of_positions(np.array(positions, np.int64))
        for source, shard, index in zip(found.source, found.shard, found.index, strict=True):
            table = shards.train[int(source)]
            try:
                sample = files.read(table[int(shard)], int(index))
            except (BadSampleError, InputError, OSError) as error:
                # data.max_bad_fraction: 0; the log names the shard.
                raise Refused(f"{table.paths[int(shard)]}: {error}") from None
            number = int(sample.files["txt"].split()[-1])
            assert sample.files["jpg"] == encoded(number), "a picture with another's caption"
            numbers.append(number)
        return numbers

    def _write(self, name: str) -> None:
        numbers = range(self.next, self.next + self.dice.randint(1, 5))
        self.next = numbers.stop
        samples = {
            f"{n:05d}": {"jpg": encoded(n), "txt": f"picture number {n}".encode()} for n in numbers
        }
        write_shard(self.shared / name, samples)
        self.changed.add(name)

    def _names(self) -> list[str]:
        return sorted(path.name for path in self.shared.glob("*.tar"))

    def _pick(self) -> str:
        return self.dice.choice(self._names())

    def _paths(self, folder: Path) -> list[str]:
        if self.address is not None:
            return [f"{self.address}/{name}" for name in self._names()]
        return [str(path) for path in sorted(folder.glob("*.tar"))]

    def _config(self, folder: Path) -> Config:
        source = {"shards": self._paths(folder), "weight": WEIGHT}
        tree = {"train": {"steps": 1}, "batch": {"global": BATCH}, "data": {"train": [source]}}
        return config_from_dict(tree)


def numbers_in(folder: Path) -> dict[str, list[int]]:
    """What each whole shard holds, by tarfile."""
    import tarfile

    found = {}
    for path in folder.glob("*.tar"):
        with suppress(tarfile.TarError, EOFError), tarfile.open(path) as tar:
            names = [member.name for member in tar if member.name.endswith(".txt")]
            found[path.name] = [int(name.removesuffix(".txt")) for name in names]
    return found


def check_history(folder: Path, seed: int, address: Callable[[Path], str] | None) -> str:
    """Live through one; how it ended."""
    dice = random.Random(seed)
    shared_address = address(folder / "shared") if address else None
    world = World(folder, dice, shared_address)
    world.live(dice.randint(0, 5))
    try:
        world.open()
    except Refused as refused:
        # People do as they are told: data index, or the shard is written anew.
        assert any(name in str(refused) for name in world.changed), (seed, world.log, refused)
        for name in world._names():
            if name not in numbers_in(world.shared) or "not whole" in str(refused):
                world._write(name)
        world.index()
        world.copy_again()
        world.changed.clear()
    try:
        begun = world.train(None, dice.randint(1, 3))
    except Refused as refused:  # of as many bytes and the same time: met when it is read
        assert any(name in str(refused) for name in world.changed), (seed, world.log, refused)
        return "refused"
    world.changed &= world.stale  # what is met only when it is read
    expected = {n for numbers in numbers_in(world.shared).values() for n in numbers}
    world.live(dice.choice([0, 0, 1, 1, 2, 4]))
    try:
        ended = world.train(begun, None)
    except Refused as refused:
        assert world.changed, (seed, world.log, "refused for nothing", str(refused))
        assert any(name in str(refused) for name in world.changed), (seed, world.log, refused)
        return "refused"
    times = Counter(ended.seen)
    assert times == dict.fromkeys(expected, int(WEIGHT)), (seed, world.log)
    return "exact"


@pytest.fixture(autouse=True)
def one_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "PAGE", 2048)
    monkeypatch.setattr(addresses.time, "sleep", lambda seconds: None)
    yield
    configure_storage(StorageSettings())


def run_histories(tmp_path, monkeypatch, seeds, address=None) -> Counter:
    ends = Counter()
    for seed in seeds:
        folder = tmp_path / str(seed)
        folder.mkdir()
        monkeypatch.setenv("PARALLEL_CLIP_CACHE", str(folder / "cache"))
        ends[check_history(folder, seed, address)] += 1
        shutil.rmtree(folder)
    return ends


def test_files(tmp_path, monkeypatch):
    ends = run_histories(tmp_path, monkeypatch, range(60))
    assert min(ends["exact"], ends["refused"]) >= 12, ends


def test_addresses(tmp_path, monkeypatch):
    pytest.importorskip("aiohttp")
    with serve(tmp_path) as server:
        ends = run_histories(
            tmp_path,
            monkeypatch,
            range(12),
            lambda folder: f"{server.address}/{folder.relative_to(tmp_path)}",
        )
    assert min(ends["exact"], ends["refused"]) >= 2, ends


@pytest.mark.long
@pytest.mark.parametrize("start", range(1000, 5000, 1000))
def test_many(tmp_path, monkeypatch, start):
    run_histories(tmp_path, monkeypatch, range(start, start + 700))
    with serve(tmp_path) as server:
        run_histories(
            tmp_path,
            monkeypatch,
            range(start + 700, start + 800),
            lambda folder: f"{server.address}/{folder.relative_to(tmp_path)}",
        )
