import pytest

from parallel_clip.data.check import check_shards
from parallel_clip.errors import InputError
from tests.data.shard_files import picture, sample, write_shard, write_shards


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
    report = check_shards(str(tmp_path), workers=workers)
    assert (report.shards, report.samples) == (4, 3 + 2 + 3)
    whole, cut, empty = report.broken
    assert whole.key is None and "it is empty" in str(whole) and "000001.tar" in str(whole)
    assert (cut.shard, cut.key) == (str(tmp_path / "000003.tar"), "cut")
    assert "truncated" in str(cut) and "000003.tar, cut" in str(cut)
    assert empty.key == "empty" and "caption is empty" in empty.reason


def test_nothing_broken(tmp_path):
    write_shards(tmp_path, [3])
    assert check_shards(str(tmp_path)).broken == []


def test_captions_of_json_are_checked(tmp_path):
    write_shard(tmp_path / "a.tar", {"a": {"jpg": picture(0), "json": b'{"alt": "x"}'}})
    assert not check_shards(str(tmp_path), caption_key="alt").broken
    assert "no .txt" in check_shards(str(tmp_path)).broken[0].reason


def test_missing_shards(tmp_path):
    with pytest.raises(InputError, match="do not exist"):
        check_shards(str(tmp_path / "a.tar"))
