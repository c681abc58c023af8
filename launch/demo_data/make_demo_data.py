"""Makes the demo's shards: emoji in two art styles with captions, split by concept.

    mkdir packages && cd packages
    npm pack emoji-datasource-google@16.0.0 @lobehub/fluent-emoji-3d@1.1.0 emojibase-data@17.0.0
    for f in *.tgz; do mkdir "${f%.tgz}" && tar xzf "$f" -C "${f%.tgz}" --strip-components=1; done
    cd .. && python launch/demo_data/make_demo_data.py \
        --noto packages/emoji-datasource-google-16.0.0 \
        --fluent packages/lobehub-fluent-emoji-3d-1.1.0 \
        --emojibase packages/emojibase-data-17.0.0

Writes into `--output` (this folder unless said otherwise):

    train-0000.tar ...   KEY.webp (64 × 64, RGB on white) and KEY.txt (a caption a line)
    test-0000.tar ...    the same for concepts that training never sees, with KEY.cls (line of
                         classes.txt, from 0) and KEY.json (concept, style, group, subgroup,
                         captions)
    classes.txt          the emoji groups, one a line: classes for zero-shot
    templates.txt        zero-shot templates in the captions' words
    pictures.csv         one line a picture: key, split, concept, family, style, group, subgroup

KEY is `HEXCODE-STYLE`. The facts of the train pictures stand in pictures.csv rather than in a .json
each, which would fill a tar block of 1 KiB a picture. The same packages, Pillow and webdataset give
the same bytes.
"""

import argparse
import csv
import io
import json
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import webdataset
from colors import main_colors
from PIL import Image

SEED = 0
PIXELS = 64
WEBP = {"quality": 82, "method": 6, "use_sharp_yuv": True}
TEST_CONCEPTS = 200
LARGEST_TEST_FAMILY = 6  # larger ones (clocks, squares...) train: a test of one kind tells little
TRAIN_SHARDS = 8
TEST_SHARDS = 2
STYLES = {"noto": "flat", "fluent": "3D"}
TEMPLATES = ["{}: a picture, flat", "{}: a picture, 3D"]  # worded like the third caption

# Country flags cannot be told for a country never seen; skin tones and hair are parts of pictures.
LEFT_OUT_SUBGROUPS = {"country-flag", "subdivision-flag", "skin-tone", "hair-style"}
# Pictures in the Fluent package that Microsoft kept out of its MIT release (trademarks on them).
NOT_FREE_IN_FLUENT = {
    "paperclip", "video game", "technologist", "man technologist", "woman technologist",
}  # fmt: skip

# Words that do not make another concept: "woman astronaut" and "astronaut", "cat face" and "cat",
# "green book" and "blue book" or "left arrow" and "up arrow" must fall on one side of the split.
PEOPLE_WORDS = frozenset(
    """adult boy boys child children girl girls man men mr mrs mx old older people person woman
    women""".split()
)
VARIANT_WORDS = PEOPLE_WORDS | frozenset(
    """a and at backhand black blue brown button closed dark dollar done down euro face facing
    female front gray green grey high in index large left left-facing leftwards light low male
    medium medium-small new not of oncoming orange pink pound purple red right right-facing
    rightwards small the up white with yen yellow""".split()
)
FAMILIES = {  # what the words do not show
    "merman": "merfolk", "mermaid": "merfolk", "merperson": "merfolk",
    "prince": "royal", "princess": "royal", "person with crown": "royal",
    "Santa Claus": "claus", "Mrs. Claus": "claus", "Mx Claus": "claus",
}  # fmt: skip


@dataclass(frozen=True)
class Concept:
    """One emoji without skin tone: `hexcode` names its pictures, `family` its side of the split."""

    hexcode: str
    name: str
    tags: tuple[str, ...]
    group: str
    subgroup: str
    family: str


@dataclass(frozen=True)
class Picture:
    """One concept in one art style, drawn in the file `source`."""

    concept: Concept
    style: str
    source: Path

    @property
    def key(self) -> str:
        return f"{self.concept.hexcode}-{self.style}"


def bare(hexcode: str) -> str:
    """`0023-FE0F-20E3` → `23-20e3`: packages differ in zeros, case and variation selectors."""
    parts = hexcode.lower().lstrip("0").split("-")
    return "-".join(part for part in parts if part != "fe0f")


def family_of(name: str) -> str:
    """The words of a name that make the concept; near-identical concepts share them.

    "mobile phone with arrow" gives `mobile phone`, "man: beard" gives `person`.
    """
    if name in FAMILIES:
        return FAMILIES[name]
    stem = name.lower().split(":")[0]
    if "o’clock" in stem or stem.endswith("-thirty"):
        return "clock"
    for part in (re.split(" with | showing ", stem)[0], stem):
        words = re.findall(r"[^\W_]+(?:[-’'][^\W_]+)*", part)
        if kept := [word for word in words if word not in VARIANT_WORDS]:
            return " ".join(kept)
    return "person" if PEOPLE_WORDS.intersection(words) else stem


def read_concepts(emojibase: Path) -> list[Concept]:
    """All emoji with a group, without skin tones, flags of places and mirror images."""
    messages = json.loads((emojibase / "en/messages.json").read_text(encoding="utf-8"))
    title = {entry["key"]: entry["message"] for entry in messages["groups"] + messages["subgroups"]}
    tables = json.loads((emojibase / "meta/groups.json").read_text(encoding="utf-8"))
    concepts = []
    for emoji in json.loads((emojibase / "en/data.json").read_text(encoding="utf-8")):
        if "group" not in emoji or emoji["label"].endswith(": facing right"):
            continue
        group, subgroup = (
            tables["groups"][str(emoji["group"])],
            tables["subgroups"][str(emoji["subgroup"])],
        )
        if subgroup in LEFT_OUT_SUBGROUPS:
            continue
        name = emoji["label"]
        tags = tuple(tag for tag in emoji.get("tags", []) if tag != name)
        concepts.append(
            Concept(
                bare(emoji["hexcode"]), name, tags, title[group], title[subgroup], family_of(name)
            )
        )
    return concepts


def find_pictures(concepts: Iterable[Concept], noto: Path, fluent: Path) -> list[Picture]:
    """The pictures that the two packages have of these concepts."""
    fluent_files = fluent / "assets" if (fluent / "assets").is_dir() else fluent
    files = {
        "noto": {bare(file.stem): file for file in (noto / "img/google/64").glob("*.png")},
        "fluent": {bare(file.stem): file for file in fluent_files.glob("*.webp")},
    }
    for style, found in files.items():
        if not found:
            raise SystemExit(f"no {style} pictures found; give the folder of the unpacked package")
    return [
        Picture(concept, style, files[style][concept.hexcode])
        for concept in concepts
        for style in STYLES
        if concept.hexcode in files[style]
        and not (style == "fluent" and concept.name in NOT_FREE_IN_FLUENT)
    ]


def split_families(pictures: Sequence[Picture]) -> set[str]:
    """Whole families, drawn at random, until they hold TEST_CONCEPTS concepts."""
    concepts = {picture.concept for picture in pictures}
    sizes: dict[str, int] = {}
    for concept in concepts:
        sizes[concept.family] = sizes.get(concept.family, 0) + 1
    families = sorted(family for family in sizes if sizes[family] <= LARGEST_TEST_FAMILY)
    random.Random(SEED).shuffle(families)
    test: set[str] = set()
    held = 0
    for family in families:
        if held + sizes[family] <= TEST_CONCEPTS:
            test.add(family)
            held += sizes[family]
    return test


def draw(source: Path) -> Image.Image:
    """The picture as 64 × 64 RGBA, centred."""
    with Image.open(source) as image:
        picture = image.convert("RGBA")
    picture.thumbnail((PIXELS, PIXELS), Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", (PIXELS, PIXELS))
    canvas.paste(picture, ((PIXELS - picture.width) // 2, (PIXELS - picture.height) // 2))
    return canvas


def encode(drawn: Image.Image) -> bytes:
    """WebP of the picture on white, without transparency."""
    canvas = Image.new("RGBA", drawn.size, "white")
    canvas.alpha_composite(drawn)
    buffer = io.BytesIO()
    canvas.convert("RGB").save(buffer, "WEBP", **WEBP)
    return buffer.getvalue()


def captions_of(picture: Picture, drawn: Image.Image) -> list[str]:
    """Four captions; the style in each tells a concept's two pictures apart.

    Names of concepts never seen mean nothing to a model; keywords, kinds and colours can.
    """
    concept, style, colors = picture.concept, STYLES[picture.style], main_colors(drawn)
    tags = list(concept.tags)
    random.Random(f"{SEED}/{picture.key}").shuffle(tags)
    few, many = ", ".join(tags[:3]), ", ".join(tags[:8])
    return [
        f"{concept.name}, {colors}, {style} emoji",
        f"a {style} emoji of {concept.name}" + (f": {few}" if few else ""),
        f"{concept.group}: {concept.subgroup}: {concept.name} in {colors}, {style}",
        (f"{many}: " if many else "") + f"{concept.name} in {colors}, drawn in {style} style",
    ]


def train_sample(picture: Picture) -> dict[str, str | bytes]:
    drawn = draw(picture.source)
    return {
        "__key__": picture.key,
        "webp": encode(drawn),
        "txt": "\n".join(captions_of(picture, drawn)),
    }


def test_sample(picture: Picture, classes: list[str]) -> dict[str, str | bytes]:
    sample, concept = train_sample(picture), picture.concept
    facts = {
        "concept": concept.name,
        "style": picture.style,
        "group": concept.group,
        "subgroup": concept.subgroup,
        "captions": sample["txt"].split("\n"),
    }
    return sample | {
        "cls": str(classes.index(concept.group)),
        "json": json.dumps(facts, ensure_ascii=False).encode(),
    }


def write_shards(
    samples: list[dict[str, str | bytes]], output: Path, name: str, shards: int
) -> None:
    """Writes `samples` into `shards` tar files of (nearly) equal counts."""
    for shard in range(shards):
        first, last = (len(samples) * s // shards for s in (shard, shard + 1))
        path = output / f"{name}-{shard:04d}.tar"
        with open(path, "wb") as file, webdataset.TarWriter(file, mtime=0) as writer:
            for sample in samples[first:last]:
                writer.write(sample)
        print(f"{path.name}: {last - first} pictures, {path.stat().st_size / 1e6:.2f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for package in ("noto", "fluent", "emojibase"):
        parser.add_argument(f"--{package}", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, metavar="FOLDER")
    options = parser.parse_args()

    pictures = find_pictures(read_concepts(options.emojibase), options.noto, options.fluent)
    classes = list(dict.fromkeys(picture.concept.group for picture in pictures))
    test_families = split_families(pictures)
    test = [picture for picture in pictures if picture.concept.family in test_families]
    train = [picture for picture in pictures if picture.concept.family not in test_families]
    random.Random(SEED).shuffle(train)

    write_shards([train_sample(p) for p in train], options.output, "train", TRAIN_SHARDS)
    write_shards([test_sample(p, classes) for p in test], options.output, "test", TEST_SHARDS)
    for name, lines in (("classes", classes), ("templates", TEMPLATES)):
        (options.output / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    with open(options.output / "pictures.csv", "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["key", "split", "concept", "family", "style", "group", "subgroup"])
        for picture in sorted(pictures, key=lambda picture: picture.key):
            c, split = picture.concept, "test" if picture in test else "train"
            row = [picture.key, split, c.name, c.family, picture.style, c.group, c.subgroup]
            table.writerow(row)
    print(f"{len(train)} train and {len(test)} test pictures, {len(classes)} classes")


if __name__ == "__main__":
    main()
