import pytest

from parallel_clip.data.storage.patterns import expand_shards, require_files
from parallel_clip.errors import InputError
from tests.data.shard_files import write_shards


@pytest.fixture
def folder(tmp_path, monkeypatch):
    write_shards(tmp_path / "data", [3, 2, 4])
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "pattern, numbers",
    [
        ("data/{000000..000002}.tar", [0, 1, 2]),
        ("data/00000{2,0}.tar", [2, 0]),
        ("data/000001.tar::data/000000.tar", [1, 0]),
        (["data/000001.tar", "data/00000{0,2}.tar"], [1, 0, 2]),
        ("data", [0, 1, 2]),
        ("data/*[12].tar", [1, 2]),
    ],
)
def test_patterns(folder, pattern, numbers):
    assert expand_shards(pattern) == [f"data/{number:06d}.tar" for number in numbers]


@pytest.mark.parametrize(
    "pattern, message",
    [
        ("data/{000000..000009}.tar", "7 of 10 shards do not exist: data/000003.tar, .*and 2 more"),
        ("data/{000000..00", "do not exist|unbalanced"),
        ("nowhere/*.tar", "no shards match"),
        ("", "no shards are named"),
        ([], "no shards are named"),
        ("nosuchkind://bucket/*.tar", "nosuchkind"),
        ("simplecache::http://host/{0..3}.tar", "chained addresses are not taken; .*data.cache"),
        ("data/000000.tar::filecache::s3://bucket/a.tar", "chained addresses are not taken"),
        (["data/000000.tar", "zip://a.tar::https://host/a.zip"], "chained addresses are not taken"),
        ("pipe:cat a.tar", "commands are not run"),
        (".", "holds no .tar"),
    ],
)
def test_patterns_that_name_nothing(folder, pattern, message):
    with pytest.raises(InputError, match=message):
        require_files(expand_shards(pattern))


def test_a_folder_named_like_a_shard_is_none(tmp_path):
    (tmp_path / "a.tar").mkdir()
    with pytest.raises(InputError, match="1 of 1 shards do not exist"):
        require_files(expand_shards(str(tmp_path / "a.tar")))
