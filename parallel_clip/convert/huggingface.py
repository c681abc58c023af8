"""Hugging Face's CLIPModel and SiglipModel: a folder of transformers as a source, and writing one
that AutoModel and AutoProcessor load.

Names: huggingface_names.py; config.json: huggingface_config.py and huggingface_config_writer.py;
pictures: huggingface_processor.py; texts: huggingface_tokenizer_files.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from parallel_clip.convert.huggingface_config import openclip_model
from parallel_clip.convert.huggingface_config_writer import huggingface_config, is_siglip
from parallel_clip.convert.huggingface_files import (
    WEIGHTS,
    WEIGHTS_INDEX,
    find_weights,
    open_weights,
)
from parallel_clip.convert.huggingface_names import (
    Family,
    Line,
    Shape,
    clip_family,
    siglip_family,
    stored_names,
)
from parallel_clip.convert.huggingface_processor import (
    PREPROCESSOR_CONFIG,
    processor_from_preprocess,
    read_processor,
)
from parallel_clip.convert.huggingface_tensors import read_ours, read_theirs
from parallel_clip.convert.huggingface_tokenizer_files import tokenizer_of_folder
from parallel_clip.convert.model_card import CARD
from parallel_clip.convert.model_weights import ModelWeights
from parallel_clip.convert.precision import PRECISIONS, rounded, written_dtype
from parallel_clip.convert.streamed_safetensors import TensorSpec, write_safetensors
from parallel_clip.convert.target_folder import new_folder
from parallel_clip.convert.tensor_fit import some_names
from parallel_clip.convert.weight_source import SourceMetadata
from parallel_clip.data.samples.transforms import Preprocess
from parallel_clip.errors import InputError
from parallel_clip.json_file import read_json_object
from parallel_clip.model.architecture import Architecture, parameter_table
from parallel_clip.model.known_models import known_name
from parallel_clip.model.openclip_json import architecture_from_json

HUGGING_FACE_CONFIG = "config.json"
SHARD_BYTES = 5 * 10**9  # as transformers cut for years; a tensor is never cut


def is_huggingface_folder(folder: Path) -> bool:
    """Whether a folder has a `config.json` of transformers: others write files of that name."""
    try:
        return "model_type" in read_json_object(folder / HUGGING_FACE_CONFIG)
    except InputError:
        return False


class HuggingFaceSource:
    """The weights of a folder of transformers, under OpenCLIP's names.

    file: of weights or the index of shards; None: the one that transformers would take.

    Raises:
        InputError: the folder is of another model, or not whole; or tensors are unknown, missing or
            of another shape: the message lists them.
    """

    content = None

    def __init__(self, folder: Path, file: Path | None = None):
        config = read_json_object(folder / HUGGING_FACE_CONFIG)
        model_cfg, left_out = openclip_model(config, str(folder / HUGGING_FACE_CONFIG))
        siglip = "timm_model_name" in model_cfg["vision_cfg"]
        file = file or find_weights(folder)
        self._tensors = open_weights(file)
        self._stored = stored = stored_names(self._tensors.shapes(), file)
        if "logit_bias" in stored.shapes and not siglip:
            model_cfg["init_logit_bias"] = -10.0  # as files have it that are written here
        tokenizer = tokenizer_of_folder(folder, siglip=siglip)
        model_cfg["text_cfg"] |= tokenizer.text_cfg
        name = folder.resolve().name
        architecture = architecture_from_json(model_cfg, name)
        architecture = replace(architecture, name=known_name(architecture) or name)
        notes = []
        if left_out:
            notes.append(
                f"{folder / HUGGING_FACE_CONFIG} leaves out {some_names(left_out, 6)}; the "
                "defaults of transformers are taken"
            )
        if stored.prefix:
            notes.append(
                f"the names of the tensors in {file} begin with {stored.prefix!r}, which is left "
                "out"
            )
        notes += tokenizer.notes
        self._family = family_of(architecture)
        self._shapes: dict[str, Shape] = {p.name: p.shape for p in parameter_table(architecture)}
        self._lines = {name: line for line in self._family.lines for name in line.ours}
        self._check(file)
        image_size = architecture.vision.image_size[0]
        preprocess_from, preprocess = read_processor(folder, image_size, siglip=siglip)
        if preprocess_from is None and siglip:
            notes.append(f"{folder} holds no {PREPROCESSOR_CONFIG}; SigLIP's usual one is taken")
        self.metadata = SourceMetadata(
            path=file,
            folder=folder,
            architecture=architecture,
            preprocess=preprocess,
            tokenizer=tokenizer.choice,
            said_by=folder / HUGGING_FACE_CONFIG,
            preprocess_from=preprocess_from,
            notes=tuple(notes),
        )

    def shapes(self) -> dict[str, Shape]:
        return dict(self._shapes)

    def read(self, name: str) -> Tensor:
        def read(theirs: str) -> Tensor:
            return self._tensors.read(self._stored.names[theirs])

        return read_ours(self._lines[name], name, self._shapes, read)

    def _check(self, file: Path) -> None:
        stored = self._stored.shapes
        expected = their_shapes(self._family, self._shapes)
        missing = [name for name in expected if name not in stored]
        extra = sorted(stored.keys() - expected.keys() - self._family.beside)
        misshapen = [
            f"{name} is {list(stored[name])}, not {list(shape)}"
            for name, shape in expected.items()
            if name in stored and stored[name] != shape and not _is_scalar(name, stored[name])
        ]
        if missing or extra or misshapen:
            parts = [
                f"{words}: {some_names(names, 20)}"
                for words, names in (
                    ("missing", missing),
                    ("unknown", extra),
                    ("of another shape", misshapen),
                )
                if names
            ]
            raise InputError(
                f"the weights in {file} are not those of the {self._family.name} that its "
                f"{HUGGING_FACE_CONFIG} describes; {'; '.join(parts)}"
            )


def _is_scalar(name: str, shape: Shape) -> bool:
    return name.startswith("logit_") and set(shape) <= {1}


def family_of(architecture: Architecture) -> Family:
    """The table of names of a model that Hugging Face has a class for."""
    return (siglip_family if is_siglip(architecture) else clip_family)(architecture)


def their_shapes(family: Family, our_shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """The shape of each of Hugging Face's tensors by its name, in the order of the table."""
    shapes: dict[str, Shape] = {}
    for line in family.lines:
        shapes |= line.their_shapes(our_shapes)
    return shapes


# ---------------------------------------------------------------------------------------- writing


def write_huggingface(
    target: Path,
    weights: ModelWeights,
    preprocess: Preprocess,
    tokenizer_files: Mapping[str, bytes],
    precision: str = "fp32",
    card: str | None = None,
) -> None:
    """Write what `AutoModel.from_pretrained(TARGET)` and `AutoProcessor.from_pretrained(TARGET)`
    load. The logit parameters stay in fp32. tokenizer_files: of `huggingface_tokenizer`; card: the
    model card.

    Raises:
        InputError: Hugging Face's classes cannot be told what the model is, `target` is not a new
            or empty folder, or a weight does not fit the precision. Nothing is written then.
    """
    architecture = weights.architecture
    dtype = str(PRECISIONS[precision]).removeprefix("torch.")
    siglip = is_siglip(architecture)
    config = huggingface_config(architecture, dtype)
    processor = processor_from_preprocess(preprocess, siglip)
    files = {**tokenizer_files}
    files |= {HUGGING_FACE_CONFIG: _json(config), PREPROCESSOR_CONFIG: _json(processor)}
    if card is not None:
        files[CARD] = card.encode()
    specs = _specs(architecture, precision)
    with new_folder(target) as folder:
        for name, content in files.items():
            (folder / name).write_bytes(content)
        _write_shards(folder, specs, _tensors(weights, precision))


def _specs(architecture: Architecture, precision: str) -> dict[str, TensorSpec]:
    family = family_of(architecture)
    shapes = {p.name: p.shape for p in parameter_table(architecture)}
    return {
        name: TensorSpec(written_dtype(line.ours[0], precision), shape)
        for line in family.lines
        for name, shape in line.their_shapes(shapes).items()
    }


def _tensors(weights: ModelWeights, precision: str) -> Iterator[Tensor]:
    """All tensors, in the order of the table."""

    def read(name: str) -> Tensor:
        return rounded(weights.read(name), name, precision)

    def read_line(line: Line) -> Iterator[Tensor]:
        return read_theirs(line, read)

    return (t for line in family_of(weights.architecture).lines for t in read_line(line))


def _write_shards(folder: Path, specs: Mapping[str, TensorSpec], tensors: Iterator[Tensor]) -> None:
    """One file, or more than one and their index where it would be larger than `SHARD_BYTES`."""
    shards: list[dict[str, TensorSpec]] = [{}]
    size = 0
    for name, spec in specs.items():
        if shards[-1] and size + spec.bytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = spec
        size += spec.bytes
    if len(shards) == 1:
        write_safetensors(folder / WEIGHTS, specs, tensors)
        return
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / name, shard, tensors)
        weight_map |= dict.fromkeys(shard, name)
    total = sum(spec.bytes for spec in specs.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / WEIGHTS_INDEX).write_bytes(_json(index))


def _json(values: Any) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()
