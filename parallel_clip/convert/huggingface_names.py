"""The names of tensors in Hugging Face's CLIPModel and SiglipModel, beside OpenCLIP's.

One table a family, read in both directions. OpenCLIP has queries, keys and values in one tensor,
Hugging Face each in its own, and SigLIP's pooling the other way round; so a line of a table may
have several tensors on either side.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from parallel_clip.convert.tensor_fit import without_wrappers
from parallel_clip.errors import InputError
from parallel_clip.model.architecture import Architecture

Shape = tuple[int, ...]

_TOWER = re.compile(r"(|.*?\.)(?:vision_model|text_model)\.")


class StoredNames(NamedTuple):
    """prefix: what stands before all names; names: the stored name of each tensor by that of
    transformers; shapes: likewise."""

    prefix: str
    names: dict[str, str]
    shapes: dict[str, Shape]


def has_huggingface_names(names: Iterable[str]) -> bool:
    return any(_TOWER.match(name) for name in names)


def stored_names(shapes: Mapping[str, Shape], path: object) -> StoredNames:
    """The names of a file's tensors without what wrappers of torch add and without what stands
    before those of the towers ("module.", "clip.", "model."). A name without that stays as it is.

    Raises:
        InputError: two tensors have one name then.
    """
    short = without_wrappers(shapes, path)
    prefix = next((found[1] for name in short if (found := _TOWER.match(name))), "")
    stored = StoredNames(prefix, {}, {})
    for name, (full, shape) in short.items():
        theirs = name.removeprefix(prefix)
        if theirs in stored.names:
            raise InputError(
                f"{path} holds two models: {full} beside {stored.names[theirs]}; save one of them "
                "alone"
            )
        stored.names[theirs], stored.shapes[theirs] = full, shape
    return stored


class Line(NamedTuple):
    """Tensors of OpenCLIP's and of Hugging Face's that hold the same numbers.

    form: "rows": the tensors of either side, one behind the other along the first axis, are one
    and the same tensor; those of Hugging Face's have equally many rows. "transposed": one is the
    other's transpose. "reshaped": the same numbers in the same order; `shape` is Hugging Face's.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    form: Literal["rows", "transposed", "reshaped"] = "rows"
    shape: Shape = ()

    def their_shapes(self, our_shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        """The shape of each of Hugging Face's tensors, given OpenCLIP's by name."""
        first = our_shapes[self.ours[0]]
        if self.form == "reshaped":
            return {self.theirs[0]: self.shape}
        if self.form == "transposed":
            return {self.theirs[0]: first[::-1]}
        if not first:
            return {self.theirs[0]: ()}
        rows = sum(our_shapes[name][0] for name in self.ours) // len(self.theirs)
        return {name: (rows, *first[1:]) for name in self.theirs}


@dataclass(frozen=True)
class Family:
    """A class of transformers: its name, the lines of its table in the order in which tensors are
    written, and the tensors beside the parameters that files of it may hold."""

    name: str
    lines: tuple[Line, ...]

    beside = frozenset({f"{tower}_model.embeddings.position_ids" for tower in ("text", "vision")})


def clip_family(architecture: Architecture) -> Family:
    """The table of CLIPModel. A bias of the logits, which CLIPModel has no place for, is kept in
    the file under OpenCLIP's name."""
    text = _text_prefix(architecture)
    lines = [Line(("logit_scale",), ("logit_scale",))]
    if architecture.init_logit_bias is not None:
        lines.append(Line(("logit_bias",), ("logit_bias",)))
    embeddings = "vision_model.embeddings"
    lines += [
        Line(("visual.class_embedding",), (f"{embeddings}.class_embedding",)),
        Line(("visual.positional_embedding",), (f"{embeddings}.position_embedding.weight",)),
        Line(("visual.conv1.weight",), (f"{embeddings}.patch_embedding.weight",)),
        *_pair("visual.ln_pre", "vision_model.pre_layrnorm"),
        *_blocks("visual.transformer.resblocks", "vision_model", architecture.vision.layers, _OWN),
        *_pair("visual.ln_post", "vision_model.post_layernorm"),
        Line(("visual.proj",), ("visual_projection.weight",), "transposed"),
        *_text_tower(text, architecture.text.layers),
        Line((f"{text}text_projection",), ("text_projection.weight",), "transposed"),
    ]
    return Family("CLIPModel", tuple(lines))


def siglip_family(architecture: Architecture) -> Family:
    """The table of SiglipModel. The image tower has timm's names in OpenCLIP."""
    vision, trunk, text = architecture.vision, "visual.trunk", _text_prefix(architecture)
    embeddings, head, pool = "vision_model.embeddings", "vision_model.head", f"{trunk}.attn_pool"
    lines = [
        Line(("logit_scale",), ("logit_scale",), "reshaped", (1,)),
        Line(("logit_bias",), ("logit_bias",), "reshaped", (1,)),
        *_pair(f"{trunk}.patch_embed.proj", f"{embeddings}.patch_embedding"),
        Line(
            (f"{trunk}.pos_embed",),
            (f"{embeddings}.position_embedding.weight",),
            "reshaped",
            (vision.patches, vision.width),
        ),
        *_blocks(f"{trunk}.blocks", "vision_model", vision.layers, _TIMM),
        *_pair(f"{trunk}.norm", "vision_model.post_layernorm"),
        Line((f"{pool}.latent",), (f"{head}.probe",)),
        *(
            Line((f"{pool}.q.{kind}", f"{pool}.kv.{kind}"), (f"{head}.attention.in_proj_{kind}",))
            for kind in ("weight", "bias")
        ),
        *_pair(f"{pool}.proj", f"{head}.attention.out_proj"),
        *_pair(f"{pool}.norm", f"{head}.layernorm"),
        *_pair(f"{pool}.mlp.fc1", f"{head}.mlp.fc1"),
        *_pair(f"{pool}.mlp.fc2", f"{head}.mlp.fc2"),
        *_text_tower(text, architecture.text.layers),
        *_pair(f"{text}text_projection", "text_model.head"),
    ]
    return Family("SiglipModel", tuple(lines))


def _text_prefix(architecture: Architecture) -> str:
    """What stands before the names of the text tower, in either of OpenCLIP's two classes."""
    return "text." if architecture.custom_text else ""


class _Block(NamedTuple):
    """How a block names its parts, in the order of `_THEIR_PARTS`, and its fused attention input,
    which ends before "weight" and "bias"."""

    parts: tuple[str, ...]
    attention_input: str


_THEIR_PARTS = ("layer_norm1", "self_attn.out_proj", "layer_norm2", "mlp.fc1", "mlp.fc2")
_OWN = _Block(("ln_1", "attn.out_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"), "attn.in_proj_")
_TIMM = _Block(("norm1", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"), "attn.qkv.")


def _pair(ours: str, theirs: str) -> Iterator[Line]:
    """The weight and the bias of a layer."""
    for kind in ("weight", "bias"):
        yield Line((f"{ours}.{kind}",), (f"{theirs}.{kind}",))


def _blocks(ours: str, their_tower: str, layers: int, names: _Block) -> Iterator[Line]:
    for layer in range(layers):
        one, other = f"{ours}.{layer}", f"{their_tower}.encoder.layers.{layer}"
        for kind in ("weight", "bias"):
            yield Line(
                (f"{one}.{names.attention_input}{kind}",),
                tuple(f"{other}.self_attn.{part}_proj.{kind}" for part in "qkv"),
            )
        for part, their_part in zip(names.parts, _THEIR_PARTS, strict=True):
            yield from _pair(f"{one}.{part}", f"{other}.{their_part}")


def _text_tower(text: str, layers: int) -> Iterator[Line]:
    """OpenCLIP's text tower, which is the same in both families but for its projection."""
    embeddings = "text_model.embeddings"
    yield Line((f"{text}token_embedding.weight",), (f"{embeddings}.token_embedding.weight",))
    yield Line((f"{text}positional_embedding",), (f"{embeddings}.position_embedding.weight",))
    yield from _blocks(f"{text}transformer.resblocks", "text_model", layers, _OWN)
    yield from _pair(f"{text}ln_final", "text_model.final_layer_norm")
