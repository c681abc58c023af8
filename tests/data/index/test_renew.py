"""`data index`: what is lost when it is killed, shared out over machines, and run twice at once."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from parallel_clip.data.index.beside import INDEX_NAME
from parallel_clip.data.index.index_file import IndexFile
from parallel_clip.data.index.journal import Journal, JournalWriter, journals_in
from parallel_clip.data.index.renew import Part, renew_index
from parallel_clip.data.index.shard_table import UNKNOWN, find_shards
from parallel_clip.data.storage.progress import print_nothing
from parallel_clip.errors import InputError
from tests.data.shard_files import sample, write_shard, write_shards

SHARDS = 40
# The command, of which each scan takes a while; it says when one has ended.
SLOW = """
import os, sys, time
import parallel_clip.data.index.scan as scan
from parallel_clip.cli import main
original = scan.scan_headers
def slowly(path):
    found = original(path)
    time.sleep(0.05)
    os.write(1, b"scanned\\n")  # by one call, as two processes do
    return found
scan.scan_headers = slowly
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """40 shards of 1 to 5 samples."""
    monkeypatch.setenv("PARALLEL_CLIP_CACHE", str(tmp_path / "cache"))
    write_shards(tmp_path / "data", [1 + number % 5 for number in range(SHARDS)])
    return tmp_path / "data"


def hear_ctrl_c() -> None:
    """Also where the tests run in the background of a shell, which has its processes ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(*arguments) -> subprocess.Popen:
    command = [sys.executable, "-c", SLOW, "data", "index", *map(str, arguments)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=hear_ctrl_c,
    )


def indexed(folder: Path) -> int:
    return int(np.sum(find_shards(str(folder), print_nothing).counts != UNKNOWN))


def assert_whole(folder: Path) -> None:
    """One index file that says of each shard what scanning it says, and nothing beside it."""
    file = IndexFile.read(folder / INDEX_NAME)
    assert file.samples.tolist() == [1 + number % 5 for number in range(SHARDS)]
    for row, name in enumerate(file.names.tolist()):
        path = str(folder / os.fsdecode(name))
        assert file.shard(row, path).table_checksum == file.checksums[row]
        assert file.changed_ns[row] == os.stat(path).st_mtime_ns
    assert sorted(os.listdir(folder)) == sorted([*(f"{n:06d}.tar" for n in range(40)), INDEX_NAME])


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_an_indexer_that_is_stopped_loses_only_the_shards_in_hand(folder, how):
    process = start(folder, "--workers", 2)
    scanned = 0
    while scanned < 15:
        scanned += "scanned" in process.stdout.readline()
    os.killpg(process.pid, how)
    process.communicate(timeout=30)
    kept = indexed(folder)
    assert 15 - 4 <= kept < SHARDS  # two at work, and as many that nobody had taken yet
    rest = subprocess.run(
        [sys.executable, "-m", "parallel_clip", "data", "index", folder],
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"making the index of {SHARDS - kept} of {SHARDS} shards" in rest.stdout
    assert_whole(folder)


def test_the_end_of_a_journal_may_be_missing(folder):
    renew_index(str(folder), print_nothing, part=Part(1, 1))
    (journal,) = journals_in(folder / f"{INDEX_NAME}.parts")
    whole = journal.read_bytes()
    first = len(Journal.read(journal))
    assert first == SHARDS
    for cut in (1, 5, 60, len(whole) - 1):
        journal.write_bytes(whole[:-cut])
        found = Journal.read(journal)
        assert len(found) < SHARDS
        for row, name in enumerate(found.names.tolist()):  # what there is, is right
            assert found.shard(row, name.decode()).samples == found.samples[row]
    journal.write_bytes(whole[:-1])
    renew_index(str(folder), print_nothing)
    assert_whole(folder)


def test_parts_are_scanned_on_many_machines_and_merged_on_one(folder, tmp_path):
    out = tmp_path / "shared"
    for number in (1, 3):
        table = renew_index(str(folder), print_nothing, part=Part(number, 3), out=out)
        assert len(table) in (13, 14)
    with pytest.raises(InputError, match=r"13 of 40 shards are in no part yet, .*000001\.tar"):
        renew_index(str(folder), print_nothing, merge=True, out=out)
    renew_index(str(folder), print_nothing, part=Part(2, 3), out=out)
    said = []
    renew_index(str(folder), said.append, merge=True, out=out)
    assert said == [f"index of 40 shards, 120 samples, written to {out / INDEX_NAME}"]
    assert os.listdir(out) == [INDEX_NAME]
    (out / INDEX_NAME).rename(folder / INDEX_NAME)
    assert_whole(folder)


def test_a_bad_shard_in_a_part_keeps_no_other_from_the_index(folder):
    cut = folder / "000003.tar"
    whole = cut.read_bytes()
    cut.write_bytes(whole[:1500])
    (folder / "000010.tar").unlink()
    pattern = f"{folder}/{{000000..000039}}.tar"
    for number in (1, 2):
        with pytest.raises(InputError, match="1 of 20 shards cannot be used"):
            renew_index(pattern, print_nothing, part=Part(number, 2))
    with pytest.raises(InputError, match="2 of 40 shards cannot be used; .* other 38") as caught:
        renew_index(pattern, print_nothing, merge=True)
    assert "000003.tar is not whole" in str(caught.value)
    assert "000010.tar does not exist" in str(caught.value)
    assert len(IndexFile.read(folder / INDEX_NAME)) == 38
    # Mended, it is taken in.
    cut.write_bytes(whole)
    renew_index(str(folder), print_nothing)
    assert len(IndexFile.read(folder / INDEX_NAME)) == 39


def test_a_full_disk_sends_the_journal_to_the_cache_folder(folder, tmp_path, monkeypatch):
    append = JournalWriter.append

    def full(self, name, shard):
        if self.path.parent.parent == folder and name > b"000011.tar":
            self._stream.write(b"half a record")
            raise OSError(errno.ENOSPC, "No space left on device")
        append(self, name, shard)

    monkeypatch.setattr(JournalWriter, "append", full)
    renew_index(str(folder), print_nothing, part=Part(1, 1))
    assert len(Journal.read(journals_in(folder / f"{INDEX_NAME}.parts")[0])) == 12
    assert indexed(folder) == SHARDS
    renew_index(str(folder), print_nothing)
    assert_whole(folder)


def test_two_indexers_of_parts_of_a_folder_both_keep_theirs(folder):
    processes = [
        start(f"{folder}/{{000000..000019}}.tar", "--workers", 1),
        start(f"{folder}/{{000020..000039}}.tar", "--workers", 1),
    ]
    for process in processes:
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
    assert_whole(folder)


def test_many_indexers_at_once_lose_nothing(folder):
    """All at the same moment, by processes that scan one or two shards each."""
    barrier = f"import time; time.sleep(max(0, {time.time() + 2.0} - time.time()))"
    code = (
        f"import sys; from parallel_clip.cli import main; {barrier}; sys.exit(main(sys.argv[1:]))"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, "data", "index", *paths],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        for paths in np.array_split([str(folder / f"{n:06d}.tar") for n in range(SHARDS)], 8)
    ]
    assert [process.wait(60) for process in processes] == [0] * 8
    assert_whole(folder)


def test_a_journal_that_is_still_written_is_read_and_left(folder):
    """Whoever merges takes what it has so far; its own process takes the rest."""
    process = start(f"{folder}/{{000000..000029}}.tar", "--workers", 1)
    scanned = 0
    while scanned < 5:
        scanned += "scanned" in process.stdout.readline()
    renew_index(f"{folder}/{{000030..000039}}.tar", print_nothing)
    assert len(journals_in(folder / f"{INDEX_NAME}.parts")) == 1
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert_whole(folder)


def test_without_locks_only_old_journals_are_taken_for_finished(folder, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    pattern = f"{folder}/{{000000..000019}}.tar"
    renew_index(pattern, print_nothing, part=Part(1, 1))
    (journal,) = journals_in(folder / f"{INDEX_NAME}.parts")
    renew_index(
        str(folder), print_nothing
    )  # its own journal goes, the other one may still be written
    assert journals_in(folder / f"{INDEX_NAME}.parts") == [journal]
    os.utime(journal, (1e9, 1e9))
    renew_index(str(folder), print_nothing)
    assert_whole(folder)


def test_bad_shards_are_listed_at_the_end_and_the_rest_is_kept(folder):
    (folder / "000003.tar").write_bytes(b"")
    cut = folder / "000011.tar"
    cut.write_bytes(cut.read_bytes()[:1500])
    (folder / "000020.tar").unlink()
    with pytest.raises(InputError) as caught:
        renew_index(f"{folder}/{{000000..000039}}.tar", print_nothing)
    message = str(caught.value)
    assert "3 of 40 shards cannot be used; the index has the other 37:" in message
    assert "000003.tar" in message and "000011.tar" in message
    assert "000020.tar does not exist" in message and "data.missing=skip" in message
    assert len(IndexFile.read(folder / INDEX_NAME)) == 37


def test_only_what_changed_is_scanned_again_and_said(folder):
    renew_index(str(folder), print_nothing)
    write_shard(folder / "000007.tar", {f"new{n}": sample(n) for n in range(3)})
    said = []
    renew_index(str(folder), said.append)
    assert said[0] == f"changed since indexed: {folder}/000007.tar"
    assert "making the index of 1 of 40 shards" in said[1]
    again = []
    renew_index(str(folder), again.append)
    assert again == []
