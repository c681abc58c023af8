import json
import os
import resource
from pathlib import Path

import pytest

from parallel_clip.data.samples.captions import CaptionRule
from parallel_clip.data.samples.decode import label_of
from parallel_clip.data.storage.progress import print_nothing
from parallel_clip.data.storage.shards import ShardFiles, scan_shard
from parallel_clip.data.tools import pack
from parallel_clip.data.tools.check import decode_all_shards
from parallel_clip.data.tools.pack import pack_folder
from parallel_clip.errors import InputError, SaveFailedError
from tests.data.shard_files import picture


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "pictures"
    for number in range(7):
        name = folder / "cats" / f"cat.v{number}.jpg" if number % 2 else folder / f"{number}.PNG"
        name.parent.mkdir(parents=True, exist_ok=True)
        name.write_bytes(picture(number, kind="JPEG" if number % 2 else "PNG"))
        name.with_suffix(".txt").write_text(f"number {number}\nagain {number}\n", "utf-8")
    (folder / "0.cls").write_text("3")
    return folder


def read(paths):
    files = ShardFiles()
    for index in map(scan_shard, map(str, paths)):
        for number in range(index.samples):
            yield files.read(index, number)


def test_a_folder_becomes_shards(folder, tmp_path):
    said = []
    paths = pack_folder(folder, tmp_path / "100%", said.append, samples_per_shard=3)
    assert [path.name for path in paths] == ["000000.tar", "000001.tar", "000002.tar"]
    assert said == [f"packed 7 pictures into 3 shards in {tmp_path / '100%'}"]
    assert not decode_all_shards(str(tmp_path / "100%")).broken
    samples = list(read(paths))
    captions = [CaptionRule().captions_of(sample) for sample in samples]
    assert sorted(captions) == [[f"number {n}", f"again {n}"] for n in range(7)] != captions
    for sample, (first, _) in zip(samples, captions, strict=True):
        number = int(first.split()[1])
        kind = "jpg" if number % 2 else "png"
        assert sample.files[kind] == picture(number, kind="JPEG" if number % 2 else "PNG")
        name = f"cats/cat.v{number}.jpg" if number % 2 else f"{number}.PNG"
        assert json.loads(sample.files["json"]) == {
            "key": sample.key, "caption": first, "width": 24, "height": 18, "file": name
        }  # fmt: skip
        if number == 0:
            assert label_of(sample) == 3
        else:
            assert "cls" not in sample.files


def test_a_table_becomes_shards(folder, tmp_path):
    table = folder / "captions.csv"
    rows = 'file,caption\n0.PNG,"one, two"\n2.PNG,other\n0.PNG,"line\nbreak"\n'
    table.write_bytes(b"\xef\xbb\xbf" + rows.encode())
    samples = list(read(pack_folder(table, tmp_path / "shards", print)))
    assert sorted(map(CaptionRule().captions_of, samples)) == [
        ["one, two", "line break"],
        ["other"],
    ]


def test_packing_is_the_same_each_time(folder, tmp_path):
    packed = [
        [path.read_bytes() for path in pack_folder(folder, tmp_path / name, seed=seed)]
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    assert packed[0] == packed[1] != packed[2]


def test_a_picture_without_caption(folder, tmp_path):
    (folder / "2.txt").unlink()
    with pytest.raises(InputError, match="1 of 7 pictures have no caption: .*2.PNG has no 2.txt"):
        pack_folder(folder, tmp_path / "shards")
    assert not (tmp_path / "shards").exists()


@pytest.mark.parametrize(
    "table, message",
    [
        ("path,text\n", "needs the columns file and caption"),
        ("", "needs the columns"),
        ("file,caption\nnone.png,a\n", "none.png is not a file"),
        ("file,caption\n0.txt,a\n", "0.txt is not a file ending in jpg"),
        ("file,caption\n0.PNG\n", "line 2: the file or the caption is empty"),
        ("file,caption\n0.PNG, \n", "line 2: the file or the caption is empty"),
        ("file,caption\n", "holds no pictures"),
    ],
)
def test_tables_that_are_wrong(folder, tmp_path, table, message):
    (folder / "t.csv").write_text(table)
    with pytest.raises(InputError, match=message):
        pack_folder(folder / "t.csv", tmp_path / "shards")


def test_sources_and_targets_that_are_wrong(folder, tmp_path):
    with pytest.raises(InputError, match="neither a folder of pictures nor"):
        pack_folder(tmp_path / "none", tmp_path / "shards")
    pack_folder(folder, tmp_path / "shards")
    with pytest.raises(InputError, match="holds shards already"):
        pack_folder(folder, tmp_path / "shards")


def test_a_file_that_is_no_picture_is_named_before_anything_is_written(folder, tmp_path):
    (folder / "4.PNG").write_text("not a picture")
    with pytest.raises(InputError, match="4.PNG is no picture"):
        pack_folder(folder, tmp_path / "shards", print)
    assert not (tmp_path / "shards").exists()


def vanish(folder, monkeypatch):
    contents = pack._contents

    def read(path):
        if path.name == "4.PNG":
            path.unlink(missing_ok=True)
        return contents(path)

    monkeypatch.setattr(pack, "_contents", read)
    return InputError, "4.PNG cannot be read: No such file"


def interrupt(folder, monkeypatch):
    def read(path):
        if path.name == "4.PNG":
            raise KeyboardInterrupt("at 4.PNG")
        return path.read_bytes()

    monkeypatch.setattr(pack, "_contents", read)
    return KeyboardInterrupt, "at 4.PNG"


def fill_the_disk(folder, monkeypatch):
    """A limit on the size of a file fails as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    write = pack._write_all

    def write_all(*arguments):
        resource.setrlimit(resource.RLIMIT_FSIZE, (8000, hard))
        try:
            return write(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    monkeypatch.setattr(pack, "_write_all", write_all)
    return SaveFailedError, "cannot be written to .*: File too large; none is left there"


def fail_to_rename(folder, monkeypatch):
    rename = Path.rename

    def fail(path, target):
        if path.name == "000001.tar":
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    return SaveFailedError, "Input/output error; none is left there"


@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize("failure", [vanish, interrupt, fill_the_disk, fail_to_rename])
def test_what_fails_or_is_interrupted_leaves_nothing(
    folder, tmp_path, monkeypatch, failure, exists
):
    target = tmp_path / "shards"
    if exists:
        target.mkdir()
        (target / "notes").write_text("mine")
    kind, words = failure(folder, monkeypatch)
    with pytest.raises(kind, match=words):
        pack_folder(folder, target, print_nothing, samples_per_shard=2)
    assert target.exists() == exists
    assert [path.name for path in tmp_path.rglob("*") if path.suffix == ".tar"] == []
    if exists:
        assert [path.name for path in target.iterdir()] == ["notes"]
    monkeypatch.undo()
    if failure is not vanish:
        assert len(pack_folder(folder, target, print_nothing, samples_per_shard=2)) == 4


def test_a_target_that_is_a_file(folder):
    with pytest.raises(InputError, match="0.cls is a file; name a new or empty folder"):
        pack_folder(folder, folder / "0.cls")


def test_names_that_are_no_utf8_are_packed(tmp_path):
    (tmp_path / "in").mkdir()
    name = os.fsencode(tmp_path) + b"/in/caf\xe9"
    for end, contents in ((b".jpg", picture(0)), (b".txt", b"coffee")):
        with open(name + end, "wb") as file:
            file.write(contents)
    (sample,) = read(pack_folder(tmp_path / "in", tmp_path / "out", print_nothing))
    assert json.loads(sample.files["json"])["file"] == "caf\\xe9.jpg"
    assert sample.files["jpg"] == picture(0) and CaptionRule().captions_of(sample) == ["coffee"]
