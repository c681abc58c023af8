"""Which shards a run is over: `data.exclude`, `data.missing`, counts beside shards, bytes."""

import json
from pathlib import Path

import pytest

from parallel_clip.config import config_from_dict
from parallel_clip.data.feeding.run_shards import find_run_shards, reopen_run_shards
from parallel_clip.data.index.shard_list import describe_differences
from parallel_clip.data.index.shard_table import UNKNOWN, counts_from_sidecars, find_shards
from parallel_clip.data.storage.progress import print_nothing
from parallel_clip.errors import InputError
from tests.data.shard_files import write_shards


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """200 shards of 1 or 2 samples."""
    monkeypatch.setenv("PARALLEL_CLIP_CACHE", str(tmp_path / "cache"))
    write_shards(tmp_path / "data", [1 + number % 2 for number in range(200)])
    return tmp_path / "data"


def config_of(folder, **data):
    source = {"shards": f"{folder}/{{000000..000199}}.tar"}
    return config_from_dict({"train": {"steps": 1}, "data": {"train": [source], **data}})


def names(shards) -> list[str]:
    return [path.rpartition("/")[2] for path in shards.train[0].paths]


def cut(path) -> None:
    path.write_bytes(path.read_bytes()[:1500])


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("spoil", [lambda path: path.unlink(), cut, lambda p: p.write_bytes(b"")])
def test_shards_that_are_missing_or_cut_are_left_out_where_that_is_asked_for(
    folder, indexed, spoil
):
    if indexed:
        find_run_shards(config_of(folder), print_nothing).save_index(print_nothing)
    for number in (3, 150):
        spoil(folder / f"{number:06d}.tar")
    with pytest.raises(InputError, match="000003.tar"):
        find_run_shards(config_of(folder), print_nothing)
    said = []
    shards = find_run_shards(config_of(folder, missing="skip"), said.append)
    shards.save_index(print_nothing)
    assert [path[-10:] for path in shards.left_out] == ["000003.tar", "000150.tar"]
    assert len(names(shards)) == 198 and not {"000003.tar", "000150.tar"} & set(names(shards))
    assert shards.orders[0].samples_per_epoch == 300 - 2 - 1
    (line,) = [line for line in said if "leaves out" in line]
    assert "data.missing: skip leaves out 2 of 200 shards" in line and "000150.tar" in line
    # Another rank leaves out the same, whatever it sees.
    other = reopen_run_shards(config_of(folder, missing="skip"), shards.left_out, check=True)
    assert other.fingerprint == shards.fingerprint


def test_shards_of_one_name_in_two_folders_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.setenv("PARALLEL_CLIP_CACHE", str(tmp_path / "cache"))
    write_shards(tmp_path / "a", [2, 3, 2])
    write_shards(tmp_path / "b", [4, 5, 4])
    source = {"shards": [f"{tmp_path}/{folder}/{{000000..000002}}.tar" for folder in "ab"]}
    data = {"train": [source], "missing": "skip", "max_missing_fraction": 0.3}
    config = config_from_dict({"train": {"steps": 1}, "data": data})
    missing = tmp_path / "a/000001.tar"
    missing.rename(tmp_path / "away")
    begun = find_run_shards(config, print_nothing)
    (tmp_path / "away").rename(missing)
    resumed = find_run_shards(config, print_nothing, begun_with=begun.listed)
    assert resumed.fingerprint == begun.fingerprint and resumed.left_out == [str(missing)]
    everything = find_run_shards(config, print_nothing)
    assert describe_differences(begun.listed, everything.listed) == "000001.tar is new"
    assert describe_differences(everything.listed, begun.listed) == "000001.tar is gone"
    assert describe_differences(begun.listed, begun.listed) == "the shards are the same"


@pytest.mark.parametrize("fraction", [0, 1])
def test_no_shard_at_all_is_refused(folder, fraction):
    for path in folder.glob("*.tar"):
        path.unlink()
    with pytest.raises(InputError, match="none of the 200 shards of data.train.0 can be used"):
        find_run_shards(
            config_of(folder, missing="skip", max_missing_fraction=fraction), print_nothing
        )


def test_too_many_missing_shards_are_refused(folder):
    for number in range(3):
        (folder / f"{number:06d}.tar").unlink()
    with pytest.raises(InputError) as caught:
        find_run_shards(config_of(folder, missing="skip"), print_nothing)
    assert "3 of 200 shards" in str(caught.value) and "1.50%" in str(caught.value)
    assert "data.max_missing_fraction is 1.00%" in str(caught.value)
    config = config_of(folder, missing="skip", max_missing_fraction=0.015)
    assert len(names(find_run_shards(config, print_nothing))) == 197


def test_a_shard_that_was_left_out_stays_out_when_the_run_goes_on(folder):
    (folder / "000007.tar").rename(folder / "away")
    config = config_of(folder, missing="skip")
    begun = find_run_shards(config, print_nothing)
    (folder / "away").rename(folder / "000007.tar")
    said = []
    resumed = find_run_shards(config, said.append, begun_with=begun.listed)
    assert resumed.fingerprint == begun.fingerprint and resumed.left_out == begun.left_out
    assert any("000007.tar was left out when the run began" in line for line in said)
    assert find_run_shards(config, print_nothing).fingerprint != begun.fingerprint


def test_a_source_that_the_run_did_not_begin_with_is_taken_as_it_is(folder):
    (folder / "000007.tar").rename(folder / "away")
    begun = find_run_shards(config_of(folder, missing="skip"), print_nothing)
    (folder / "away").rename(folder / "000007.tar")
    write_shards(folder.parent / "clean", [3])
    tree = config_of(folder, missing="skip").to_tree()
    tree["phases"] = [{"until": "50%"}, {"sources": [{"shards": str(folder.parent / "clean")}]}]
    config = config_from_dict(tree)
    shards = find_run_shards(config, print_nothing, begun_with=begun.listed)
    assert [len(table) for table in shards.train] == [199, 1]
    assert shards.left_out == begun.left_out


@pytest.mark.parametrize(
    "exclude, gone",
    [
        (["000003.tar"], {3}),
        (["{000003,000011}.tar"], {3, 11}),
        (["{000010..000012}.tar", "*9.tar"], {10, 11, 12, *range(9, 200, 10)}),
        (["*/data/00001?.tar"], set(range(10, 20))),
    ],
)
def test_shards_are_excluded_by_name_or_path(folder, exclude, gone):
    shards = find_run_shards(config_of(folder, exclude=exclude), print_nothing)
    assert names(shards) == [f"{n:06d}.tar" for n in range(200) if n not in gone]
    other = reopen_run_shards(config_of(folder, exclude=exclude), check=True)
    assert other.fingerprint == shards.fingerprint


@pytest.mark.parametrize(
    "exclude, words",
    [(["*"], "leaves none of the 200 shards of data.train.0"), (["00000x.tar"], "is no shard of")],
)
def test_an_exclusion_of_all_or_of_nothing_is_refused(folder, exclude, words):
    with pytest.raises(InputError, match=words):
        find_run_shards(config_of(folder, exclude=exclude), print_nothing)


def test_counts_beside_shards_suffice_for_a_dry_run(folder):
    """As img2dataset writes them: successes in the statistics, rows by status in the table."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    for number in range(200):
        stem = folder / f"{number:06d}"
        if number % 3 == 0:
            stats = {"count": 10, "successes": 1 + number % 2, "failed_to_download": 8}
            (folder / f"{number:06d}_stats.json").write_text(json.dumps(stats))
        elif number % 3 == 1:
            status = ["success"] * (1 + number % 2) + ["failed_to_download"] * 3
            parquet.write_table(pyarrow.table({"status": status}), f"{stem}.parquet")
    sizes = {f"{n:06d}.tar": 1 + n % 2 for n in range(200) if n % 3 == 2}
    (folder / "sizes.json").write_text(json.dumps(sizes))
    said = []
    shards = find_run_shards(config_of(folder), said.append, counts_suffice=True)
    assert shards.train[0].counts.tolist() == [1 + number % 2 for number in range(200)]
    assert not said and not list(folder.glob("*.index*"))


def test_damaged_statistics_are_no_count(folder):
    (folder / "000001_stats.json").write_text('{"count": 3}')
    (folder / "000002_stats.json").write_text("not json")
    (folder / "000003.parquet").write_bytes(b"PAR1")
    table = counts_from_sidecars(find_shards(f"{folder}/{{000001..000003}}.tar", print_nothing))
    assert table.counts.tolist() == [UNKNOWN] * 3


def test_the_bytes_of_a_sample_are_a_mean_over_an_epoch(folder):
    shards = find_run_shards(config_of(folder), print_nothing)
    size = sum(path.stat().st_size for path in folder.glob("*.tar"))
    (order,) = shards.orders
    assert shards.sample_bytes(order) == pytest.approx(size / 300)
    assert not shards.is_fetched(order)


def test_phases_have_orders_over_one_list_of_shards(folder):
    """Of the sources of their own alone, in which a source that comes twice is opened once."""
    write_shards(folder.parent / "clean", [3])
    clean, few = {"shards": str(folder.parent / "clean")}, {"shards": f"{folder}/00000?.tar"}
    tree = config_of(folder).to_tree()
    tree["phases"] = [{"until": "50%"}, {"sources": [clean, few]}]
    config = config_from_dict(tree)
    shards = find_run_shards(config, print_nothing)
    assert [table.samples for table in shards.train] == [300, 3, 15]
    assert [order.source_samples for order in shards.orders] == [[300, 0, 0], [0, 3, 15]]
    size = sum(path.stat().st_size for path in shards_of(shards.train[1:]))
    assert shards.sample_bytes(shards.orders[1]) == pytest.approx(size / 18)
    shards.save_index(print_nothing)
    assert reopen_run_shards(config, check=True).fingerprint == shards.fingerprint
    tree["phases"][1]["sources"] = [{**clean, "weight": 0.1}]
    with pytest.raises(InputError, match=r"^phases.1: an epoch has no samples"):
        find_run_shards(config_from_dict(tree), print_nothing)


def shards_of(tables):
    return [Path(path) for table in tables for path in table.paths]
