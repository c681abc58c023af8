import json
import os
import subprocess
import sys

import pytest
from rich.console import Console

from parallel_clip.cli import main
from parallel_clip.data.storage.progress import print_nothing
from parallel_clip.data.storage.shards import ShardFiles
from parallel_clip.data.tools.check import decode_all_shards
from parallel_clip.data.tools.check_report import print_report, report_tree
from parallel_clip.errors import InputError
from tests.data.shard_files import index_shards, picture, sample, write_shard, write_shards


@pytest.mark.parametrize("workers", [1, 2])
def test_everything_broken_is_found(tmp_path, workers):
    write_shards(tmp_path, [3, 2, 2])
    (tmp_path / "000001.tar").write_bytes(b"")
    bad = {
        "cut": {"jpg": picture(0, (64, 64))[:-500], "txt": b"a"},
        "good": sample(1),
        "empty": {"jpg": picture(1), "txt": b""},
    }
    write_shard(tmp_path / "000003.tar", bad)
    report = decode_all_shards(str(tmp_path), workers=workers)
    assert (report.shards, report.samples) == (4, 3 + 2 + 3)
    whole, cut, empty = report.broken
    assert whole.key is None and "it is empty" in str(whole) and "000001.tar" in str(whole)
    assert (cut.shard, cut.key) == (str(tmp_path / "000003.tar"), "cut")
    assert "truncated" in str(cut) and "000003.tar, cut" in str(cut)
    assert empty.key == "empty" and "caption is empty" in empty.reason


def test_nothing_broken(tmp_path):
    write_shards(tmp_path, [3])
    assert decode_all_shards(str(tmp_path)).broken == []


def test_captions_of_json_are_checked(tmp_path):
    write_shard(tmp_path / "a.tar", {"a": {"jpg": picture(0), "json": b'{"alt": "x"}'}})
    assert not decode_all_shards(str(tmp_path), caption_key="alt").broken
    assert "no .txt" in decode_all_shards(str(tmp_path)).broken[0].reason


def test_pixels_are_bounded(tmp_path, capsys):
    path = str(write_shard(tmp_path / "a.tar", {"a": sample(1)}))  # 24 x 18
    assert main(["data", "check", path, "--max-pixels", "432"]) == 0
    assert main(["data", "check", path, "--max-pixels", "431"]) == 2
    assert "24 x 18 pixels, at most 431 (data.max_pixels)" in capsys.readouterr().out


def test_missing_shards(tmp_path):
    with pytest.raises(InputError, match="do not exist"):
        decode_all_shards(str(tmp_path / "a.tar"))


def test_sizes_and_captions_are_counted_and_drawn(tmp_path, capsys):
    samples = {
        "a": {"jpg": picture(0, (40, 70)), "txt": b"12345\n1234567"},
        "b": {"jpg": picture(1, (300, 31)), "txt": b"x" * 200},
        "c": {"jpg": picture(2, (33, 33)), "txt": "\u00e9\u00e9".encode()},
    }
    write_shard(tmp_path / "a.tar", samples)
    report = decode_all_shards(str(tmp_path))
    tree = report_tree(report)
    assert tree["shorter_side_pixels"] == {16: 1, 32: 2}
    assert tree["caption_bytes"] == {4: 3, 128: 1}
    assert (tree["samples"], tree["captions"], tree["broken"]) == (3, 4, [])
    print_report(report, Console(width=80))
    shown = capsys.readouterr().out
    assert "32 to 63  2" in shown and "length of 4 captions" in shown
    assert shown.splitlines()[-1] == "1 shards, 3 samples, 0 broken"


def test_the_samples_that_an_index_knows_are_looked_for(tmp_path):
    """A whole shard in the place of another one is no less broken."""
    write_shards(tmp_path, [3, 4])
    index_shards(str(tmp_path), lambda line: None)
    (tmp_path / "000001.tar").replace(tmp_path / "000000.tar")
    report = decode_all_shards(str(tmp_path / "000000.tar"))
    assert report.samples == 3 and len(report.broken) == 4
    assert report.broken[0].key is None and "not as it was" in report.broken[0].reason
    assert "data index" in report.broken[0].reason


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), OSError(116, "Stale handle")])
def test_a_file_that_fails_while_it_is_read_is_broken_and_the_rest_is_checked(
    tmp_path, monkeypatch, error
):
    first, second = write_shards(tmp_path, [3, 2])
    read = ShardFiles.read

    def fail(files, shard, index):
        if shard.path == str(first) and index == 1:
            raise error
        return read(files, shard, index)

    monkeypatch.setattr(ShardFiles, "read", fail)
    report = decode_all_shards(str(tmp_path), print_nothing)
    assert [str(item) for item in report.broken] == [
        f"shard {first} cannot be read: {error.strerror}"
    ]
    assert (report.shards, report.samples, report.captions) == (2, 5, 3)


@pytest.mark.parametrize("errno", [2, 13])
def test_a_file_that_cannot_be_opened_any_more(tmp_path, monkeypatch, errno):
    first, second = write_shards(tmp_path, [3, 2])
    opened = os.open

    def fail(path, *arguments):
        if path == str(first):
            raise OSError(errno, os.strerror(errno), path)
        return opened(path, *arguments)

    monkeypatch.setattr(os, "open", fail)
    report = decode_all_shards(str(tmp_path), print_nothing)
    assert [str(item) for item in report.broken] == [
        f"shard {first} cannot be read: {os.strerror(errno)}"
    ]
    assert report.captions == 2


@pytest.mark.parametrize("change", [os.remove, lambda path: os.truncate(path, 1024)])
def test_a_file_that_changes_while_it_is_read(tmp_path, monkeypatch, change):
    first, second = write_shards(tmp_path, [3, 2])
    read = ShardFiles.read

    def meanwhile(files, shard, index):
        if shard.path == str(first) and index == 1:
            change(first)
        return read(files, shard, index)

    monkeypatch.setattr(ShardFiles, "read", meanwhile)
    report = decode_all_shards(str(tmp_path), print_nothing)
    assert "was changed, or went, while it was checked" in report.broken[-1].reason
    assert {item.shard for item in report.broken} == {str(first)} and report.samples == 5


def test_names_of_any_bytes_give_json(tmp_path):
    path = os.fsencode(tmp_path) + b"/caf\xe9.tar"
    write_shard(os.fsdecode(path), {"caf\udce8": {"txt": b"a"}, "b": sample(1)})
    command = [sys.executable, "-m", "parallel_clip", "data", "check", path, "--workers", "2"]
    done = subprocess.run([*command, "--json", "-"], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (2, b"")
    (item,) = json.loads(done.stdout.decode("utf-8", "strict"))["broken"]
    assert item["shard"] == f"{tmp_path}/caf\\xe9.tar"
    assert (item["key"], item["reason"]) == ("caf\\xe8", "no picture, only .txt")
    said = subprocess.run(command, capture_output=True, check=False)
    assert (
        said.returncode == 2 and b"caf\\xe9.tar, caf\\xe8: no" in said.stdout and said.stderr == b""
    )
