"""One table of parameter names: ours, OpenCLIP's, the full shape, and how it lies on the ranks.

A parameter's *global name* is its name in an OpenCLIP state dict, and its *full shape* the one it
has there. Everything that must not depend on the layout (initial values, checkpoints, conversion,
weight decay) speaks of parameters by this name and shape.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from parallel_clip.model.architecture import Architecture
from parallel_clip.model.towers.text import TextConfig
from parallel_clip.model.towers.vision import VisionConfig


@dataclass(frozen=True)
class Segment:
    """`length` rows that lie at `whole` in the full tensor and at `local` in a rank's part."""

    whole: int
    local: int
    length: int


@dataclass(frozen=True)
class Placement:
    """How a full tensor lies on the tensor-parallel ranks.

    axis: the axis that is split; None where every rank holds the whole.
    blocks: the axis consists of so many equal blocks, each of which is split by itself
        (3 for OpenCLIP's [query; key; value]).
    padded: the axis may be padded at its end to a multiple of the tensor size (the vocabulary).
    """

    axis: int | None = None
    blocks: int = 1
    padded: bool = False

    def segments(self, length: int, rank: int, size: int) -> list[Segment]:
        """Where the split axis, `length` long in full, lies on `rank` of `size` ranks."""
        if self.axis is None:
            raise ValueError("a replicated tensor has no split axis")
        if self.padded:
            share = -(-length // size)
            start = min(rank * share, length)
            return [Segment(start, 0, min(share, length - start))]
        block = length // self.blocks
        share = block // size
        return [Segment(i * block + rank * share, i * share, share) for i in range(self.blocks)]

    def local_length(self, length: int, size: int) -> int:
        return -(-length // size) if self.padded else length // size


WHOLE = Placement()
ROWS = Placement(axis=0)
COLUMNS = Placement(axis=1)
QUERY_KEY_VALUE = Placement(axis=0, blocks=3)
VOCABULARY = Placement(axis=0, padded=True)


@dataclass(frozen=True)
class Parameter:
    """name: in an OpenCLIP state dict; module: in our model, layers counted over the whole tower;
    shape: in full; placement: on the tensor ranks."""

    name: str
    module: str
    shape: tuple[int, ...]
    placement: Placement = WHOLE

    def local_shape(self, size: int) -> tuple[int, ...]:
        if self.placement.axis is None:
            return self.shape
        shape = list(self.shape)
        axis = self.placement.axis
        shape[axis] = self.placement.local_length(shape[axis], size)
        return tuple(shape)


def parameter_table(architecture: Architecture) -> list[Parameter]:
    """Every parameter of the model, in OpenCLIP's order of towers."""
    text_prefix = "text." if architecture.custom_text else ""
    return [
        *_logit_parameters(architecture),
        *_vision_parameters(architecture.vision, architecture.embed_dim),
        *_text_parameters(architecture.text, architecture.embed_dim, text_prefix),
    ]


def is_decayed(name: str, shape: tuple[int, ...]) -> bool:
    """Weight decay as OpenCLIP 3.x: on all but norms, biases and single numbers."""
    return len(shape) >= 2 and "bias" not in name and "ln" not in name and "logit" not in name


def _logit_parameters(architecture: Architecture) -> Iterator[Parameter]:
    yield Parameter("logit_scale", "logit_scale", ())
    if architecture.init_logit_bias is not None:
        yield Parameter("logit_bias", "logit_bias", ())


def _vision_parameters(vision: VisionConfig, embed_dim: int) -> Iterator[Parameter]:
    width = vision.width
    yield Parameter("visual.class_embedding", "vision.class_embedding", (width,))
    yield Parameter(
        "visual.positional_embedding", "vision.positional_embedding", (vision.tokens, width)
    )
    yield Parameter(
        "visual.conv1.weight", "vision.patch_embedding.weight", (width, 3, *vision.patch_size)
    )
    if vision.pre_norm:
        yield from _norm("visual.ln_pre", "vision.pre_norm", width)
    yield from _blocks("visual.transformer.resblocks", "vision.block.layers", vision)
    yield from _norm("visual.ln_post", "vision.post_norm", width)
    yield Parameter("visual.proj", "vision.projection", (width, embed_dim))


def _text_parameters(text: TextConfig, embed_dim: int, prefix: str) -> Iterator[Parameter]:
    width = text.width
    yield Parameter(
        f"{prefix}token_embedding.weight",
        "text.token_embedding.weight",
        (text.vocab_size, width),
        VOCABULARY,
    )
    yield Parameter(
        f"{prefix}positional_embedding", "text.positional_embedding", (text.context_length, width)
    )
    yield from _blocks(f"{prefix}transformer.resblocks", "text.block.layers", text)
    yield from _norm(f"{prefix}ln_final", "text.post_norm", width)
    if text.projection_bias:
        yield Parameter(
            f"{prefix}text_projection.weight", "text.projection.weight", (embed_dim, width)
        )
        yield Parameter(f"{prefix}text_projection.bias", "text.projection.bias", (embed_dim,))
    else:
        yield Parameter(f"{prefix}text_projection", "text.projection", (width, embed_dim))


def _norm(name: str, module: str, width: int) -> Iterator[Parameter]:
    yield Parameter(f"{name}.weight", f"{module}.weight", (width,))
    yield Parameter(f"{name}.bias", f"{module}.bias", (width,))


def _blocks(names: str, modules: str, tower: VisionConfig | TextConfig) -> Iterator[Parameter]:
    width, mlp_width = tower.width, tower.mlp_width
    for layer in range(tower.layers):
        name, module = f"{names}.{layer}", f"{modules}.{layer}"
        attention, mlp = f"{module}.self_attention", f"{module}.mlp"
        yield from _norm(f"{name}.ln_1", f"{attention}.norm", width)
        yield Parameter(
            f"{name}.attn.in_proj_weight",
            f"{attention}.linear_qkv.weight",
            (3 * width, width),
            QUERY_KEY_VALUE,
        )
        yield Parameter(
            f"{name}.attn.in_proj_bias",
            f"{attention}.linear_qkv.bias",
            (3 * width,),
            QUERY_KEY_VALUE,
        )
        yield Parameter(
            f"{name}.attn.out_proj.weight",
            f"{attention}.linear_proj.weight",
            (width, width),
            COLUMNS,
        )
        yield Parameter(f"{name}.attn.out_proj.bias", f"{attention}.linear_proj.bias", (width,))
        yield from _norm(f"{name}.ln_2", f"{mlp}.norm", width)
        yield Parameter(
            f"{name}.mlp.c_fc.weight", f"{mlp}.linear_fc1.weight", (mlp_width, width), ROWS
        )
        yield Parameter(f"{name}.mlp.c_fc.bias", f"{mlp}.linear_fc1.bias", (mlp_width,), ROWS)
        yield Parameter(
            f"{name}.mlp.c_proj.weight", f"{mlp}.linear_fc2.weight", (width, mlp_width), COLUMNS
        )
        yield Parameter(f"{name}.mlp.c_proj.bias", f"{mlp}.linear_fc2.bias", (width,))
        if tower.layer_scale is not None:
            yield Parameter(f"{name}.ls_1.gamma", f"{module}.self_attn_bda.gamma", (width,))
            yield Parameter(f"{name}.ls_2.gamma", f"{module}.mlp_bda.gamma", (width,))


@torch.no_grad()
def load_slice(
    tensor: nn.Parameter, parameter: Parameter, whole: Tensor, tensor_group: ProcessGroup
) -> None:
    """Copy this rank's part of the full tensor `whole` into `tensor`."""
    tensor.copy_(local_slice(whole, parameter.placement, tensor_group.rank(), tensor_group.size()))


def local_slice(whole: Tensor, placement: Placement, rank: int, size: int) -> Tensor:
    """The part of a full tensor that `rank` of `size` tensor ranks holds; zeros where padded."""
    if placement.axis is None or size == 1:
        return whole
    axis = placement.axis
    shape = list(whole.shape)
    shape[axis] = placement.local_length(whole.shape[axis], size)
    part = whole.new_zeros(shape)
    for segment in placement.segments(whole.shape[axis], rank, size):
        part.narrow(axis, segment.local, segment.length).copy_(
            whole.narrow(axis, segment.whole, segment.length)
        )
    return part
