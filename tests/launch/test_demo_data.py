"""The demo's shipped shards hold what launch/demo_data/make_demo_data.py says."""

import csv
import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

FOLDER = Path(__file__).parents[2] / "launch" / "demo_data"
PIXELS = 64


def read_shards(split: str) -> dict[str, dict[str, bytes]]:
    """key -> extension -> bytes over all shards of `split`; a key met twice fails."""
    samples: dict[str, dict[str, bytes]] = {}
    for path in sorted(FOLDER.glob(f"{split}-*.tar")):
        seen_before = set(samples)
        with tarfile.open(path) as shard:
            for member in shard:
                assert member.isfile() and member.mtime == 0
                key, extension = member.name.split(".")
                assert key not in seen_before
                samples.setdefault(key, {})[extension] = shard.extractfile(member).read()
    return samples


@pytest.fixture(scope="module")
def splits() -> dict[str, dict[str, dict[str, bytes]]]:
    return {split: read_shards(split) for split in ("train", "test")}


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    with open(FOLDER / "pictures.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def classes() -> list[str]:
    return (FOLDER / "classes.txt").read_text(encoding="utf-8").splitlines()


def test_counts(splits, rows):
    assert len(splits["train"]) == 2828
    assert len(splits["test"]) == 400
    for split, samples in splits.items():
        assert set(samples) == {row["key"] for row in rows if row["split"] == split}


def test_size():
    assert sum(path.stat().st_size for path in FOLDER.glob("*.tar")) < 10_000_000


def test_no_concept_on_both_sides(rows):
    for field in ("concept", "family"):
        train, test = ({r[field] for r in rows if r["split"] == s} for s in ("train", "test"))
        assert not train & test
    assert len({row["concept"] for row in rows if row["split"] == "test"}) == 200


def test_both_styles_of_an_emoji_lie_on_one_side(rows):
    sides: dict[str, set[str]] = {}
    for row in rows:
        sides.setdefault(row["key"].removesuffix(f"-{row['style']}"), set()).add(row["split"])
    assert all(len(splits) == 1 for splits in sides.values())


def test_pictures_decode(splits):
    for samples in splits.values():
        for key, sample in samples.items():
            with Image.open(io.BytesIO(sample["webp"])) as image:
                image.load()
                assert (image.format, image.mode, image.size) == ("WEBP", "RGB", (PIXELS, PIXELS))
                assert len(image.getcolors(PIXELS * PIXELS)) > 8, f"{key} is blank"


def test_captions(splits, rows):
    names = {row["key"]: row["concept"] for row in rows}
    owner: dict[str, str] = {}
    for samples in splits.values():
        for key, sample in samples.items():
            captions = sample["txt"].decode().split("\n")
            assert len(captions) == 4
            for caption in captions:
                assert caption == caption.strip()
                assert names[key] in caption
                assert owner.setdefault(caption, key) == key, "a caption fits one picture only"


def test_facts_and_classes_of_test_pictures(splits, rows, classes):
    assert len(classes) == len(set(classes)) == 9
    by_key = {row["key"]: row for row in rows}
    for key, sample in splits["test"].items():
        facts, row = json.loads(sample["json"]), by_key[key]
        assert facts["captions"] == sample["txt"].decode().split("\n")
        for field in ("concept", "style", "group", "subgroup"):
            assert facts[field] == row[field]
        assert classes[int(sample["cls"])] == row["group"]


def test_licences_lie_beside_the_data():
    attribution = (FOLDER / "ATTRIBUTION.md").read_text(encoding="utf-8")
    licences = sorted((FOLDER / "LICENSES").iterdir())
    assert len(licences) == 4
    for licence in licences:
        assert f"LICENSES/{licence.name}" in attribution
