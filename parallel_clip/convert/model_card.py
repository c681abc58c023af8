"""The model card: README.md with the header that Hugging Face's hub reads. Facts only: what is not
known is not in it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence

import yaml

from parallel_clip import __version__
from parallel_clip.convert.huggingface_config_writer import is_siglip
from parallel_clip.convert.training_facts import MixedFacts, TrainingFacts
from parallel_clip.convert.zero_shot_pipeline import text_length_line
from parallel_clip.data.samples.transforms import Preprocess
from parallel_clip.errors import InputError
from parallel_clip.model.architecture import Architecture, parameter_table
from parallel_clip.model.towers.transformer import TowerConfig

CARD = "README.md"

_USE = {
    "huggingface": """\
```python
from transformers import AutoModel, AutoProcessor, pipeline

model = AutoModel.from_pretrained("FOLDER")
processor = AutoProcessor.from_pretrained("FOLDER")
classify = pipeline("zero-shot-image-classification", model="FOLDER")
```""",
    "openclip": """\
```python
import open_clip

model, _, transform = open_clip.create_model_and_transforms("local-dir:FOLDER")
tokenizer = open_clip.get_tokenizer("local-dir:FOLDER")
```""",
}
_LIBRARIES = {"huggingface": "transformers", "openclip": "open_clip"}


def check_license(license_name: str | None) -> None:
    """InputError: the name is none that a card's header can have."""
    if license_name is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", license_name):
        raise InputError(
            f"--license {license_name!r} is no identifier of a licence as Hugging Face's hub has "
            "them: small letters, digits, dots and hyphens, such as apache-2.0, mit, cc-by-4.0, or "
            "other"
        )


def model_card(
    architecture: Architecture,
    preprocess: Preprocess,
    tokenizer: str | None,
    precision: str,
    to: str,
    training: TrainingFacts | None = None,
    license_name: str | None = None,
    mixed: Sequence[MixedFacts] = (),
) -> str:
    """The text of the card.

    tokenizer: its name, None for CLIP's own; to: huggingface or openclip, whose libraries load the
    folder; training: None where nothing is known of it; license_name: None where the user has not
    named one, and then the card names none; mixed: the checkpoints that the weights are the mean
    of, instead of `training`.
    """
    header = {
        "library_name": _LIBRARIES[to],
        "pipeline_tag": "zero-shot-image-classification",
        "tags": ["siglip" if is_siglip(architecture) else "clip"],
    }
    if license_name is not None:
        header = {"license": license_name, **header}
    parameters = sum(math.prod(p.shape) for p in parameter_table(architecture))
    rows = [
        ("image tower", _vision_words(architecture)),
        ("text tower", _text_words(architecture)),
        ("features", f"{architecture.embed_dim} numbers a picture or text"),
        ("parameters", f"{parameters:,}, in {precision}"),
        ("preprocessing", str(preprocess)),
        ("tokenizer", tokenizer or "CLIP's own byte-pair encoding"),
    ]
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
        f"# {architecture.name}",
        "A model of pictures and texts: an image tower and a text tower, whose features are near "
        "each other where a text fits a picture.",
        "## Model",
        _table(rows),
        "## Use",
        f"With FOLDER the folder of this file or the name of its repository"
        f"{'' if to == 'huggingface' else ' (then `hf-hub:` for `local-dir:`)'}:",
        *_use(architecture, to),
        "## Training",
        *(_mixed_parts(mixed) if mixed else _training_parts(training)),
        "## Licence",
        f"{license_name}, as stated by who converted it."
        if license_name
        else "Not stated by who converted it.",
        f"Converted by parallel_clip {__version__}.",
    ]
    return "\n\n".join(parts) + "\n"


def _use(architecture: Architecture, to: str) -> Iterator[str]:
    yield _USE[to]
    line = text_length_line(architecture)
    if to == "huggingface" and line is not None:
        yield "The pipeline pads texts to another length than this model's, unless told:"
        yield f"```python\n{line}\n```"


def _training_parts(training: TrainingFacts | None) -> Iterator[str]:
    if training is None:
        yield "The checkpoint that this was converted from does not say how it was trained."
        return
    yield _table(training.rows)
    if training.figures:
        yield "Evaluated on held-out data at this step:"
        yield _table((what, f"{value:.6g}") for what, value in training.figures)


def _mixed_parts(mixed: Sequence[MixedFacts]) -> Iterator[str]:
    yield (
        "The weights are the weighted mean of those of several checkpoints, as in "
        "[WiSE-FT](https://arxiv.org/abs/2109.01903) and "
        "[model soups](https://arxiv.org/abs/2203.05482); so is `logit_scale`, a logarithm."
    )
    yield _table((facts.name, f"{facts.share:.4g}") for facts in mixed)
    for facts in mixed:
        yield f"### {facts.name}"
        # Not its figures: they are not those of the mean.
        yield from _training_parts(facts.training and TrainingFacts(facts.training.rows))


def _vision_words(architecture: Architecture) -> str:
    vision = architecture.vision
    height, width = vision.image_size
    patch = " × ".join(map(str, vision.patch_size))
    return f"{_tower_words(vision)}, {height} × {width} pixels in patches of {patch}"


def _text_words(architecture: Architecture) -> str:
    text = architecture.text
    return (
        f"{_tower_words(text)}, {text.context_length} tokens of a vocabulary of {text.vocab_size:,}"
    )


def _tower_words(tower: TowerConfig) -> str:
    return f"transformer of {tower.layers} layers of width {tower.width} with {tower.heads} heads"


def _table(rows: Iterable[tuple[str, str]]) -> str:
    escaped = ((what, value.replace("|", "\\|")) for what, value in rows)
    lines = [f"| {what} | {value} |" for what, value in escaped]
    return "\n".join(["| | |", "|---|---|", *lines])
