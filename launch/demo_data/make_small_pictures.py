"""Makes the demo's pictures small, anywhere on white: another kind of picture, to fine-tune on.

    python launch/demo_data/make_small_pictures.py FOLDER

Writes a shard for each of the demo's, under its name, into the new folder FOLDER. A picture of
64 × 64 pixels becomes one of 40 × 40, in a place of a white one of 64 × 64 that its key decides;
key, captions, class and facts stay.
"""

import argparse
import io
import random
from pathlib import Path

import webdataset
from PIL import Image

DEMO_DATA = Path(__file__).parent
SEED = 0
PIXELS = 64
SMALL = 40


def make_small(key: str, picture: bytes) -> bytes:
    """The WebP `picture` as a PNG of the same size with all of it in a part."""
    draw = random.Random(f"{SEED}/{key}")
    small = Image.open(io.BytesIO(picture)).convert("RGB")
    small = small.resize((SMALL, SMALL), Image.Resampling.LANCZOS)
    ground = Image.new("RGB", (PIXELS, PIXELS), "white")
    ground.paste(small, (draw.randint(0, PIXELS - SMALL), draw.randint(0, PIXELS - SMALL)))
    buffer = io.BytesIO()
    ground.save(buffer, "PNG")
    return buffer.getvalue()


def write_small(source: Path, target: Path) -> int:
    """Writes the samples of the shard `source` with small pictures; returns how many there are."""
    samples = webdataset.WebDataset(str(source), shardshuffle=False, empty_check=False)
    count = 0
    with open(target, "wb") as file, webdataset.TarWriter(file, mtime=0) as writer:
        for sample in samples:
            files = {name: value for name, value in sample.items() if name != "webp"}
            writer.write(files | {"png": make_small(sample["__key__"], sample["webp"])})
            count += 1
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True)
    shards = sorted(DEMO_DATA.glob("*.tar"))
    count = sum(write_small(shard, folder / shard.name) for shard in shards)
    print(f"{count:,} small pictures in {folder}")


if __name__ == "__main__":
    main()
