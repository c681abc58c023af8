"""The steps that are counted: every kind of layout, and a small model. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Settings = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One rank of a layout. settings: of the config, beside the layout's; vision: of the model;
    fed: the inputs come from a loader by DeviceFeed, and are on the device already otherwise."""

    world: int = 1
    rank: int = 0
    settings: Settings = field(default_factory=dict)
    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1
    sequence: bool = False
    vision: Settings = field(default_factory=dict)
    microbatches: int = 2
    fed: bool = False


def bf16(**sections: Any) -> Settings:
    return {"precision": "bf16", **sections}


STASH = {"schedule": "stash"}
OPTIONS = {"duplicates": "tokens", "label_smoothing": 0.1}
CAPTIONS = {"train": [{"shards": "none.tar", "caption_lines": True}], "captions_per_image": 3}
SIGLIP = {"timm_model_name": "vit_base_patch16_siglip_224", "timm_pool": "map", "timm_proj": ""}
PE_CORE = SIGLIP | {"timm_model_name": "vit_pe_core_base_patch16_224"}

CASES: dict[str, Case] = {
    "fp32": Case(settings={"precision": "fp32"}),
    "bf16": Case(settings=bf16()),
    "recompute-selective": Case(settings=bf16(recompute="selective")),
    "recompute-full": Case(settings=bf16(recompute="full")),
    "stash": Case(settings=bf16(parallel=STASH)),
    "sigmoid": Case(settings=bf16(loss={"kind": "sigmoid"})),
    "patch-dropout": Case(settings=bf16(), vision={"patch_dropout": 0.4}),
    "data": Case(2, 1, bf16()),
    "data-layer-decay": Case(
        2, 1, bf16(optimizer={"layer_decay": 0.75, "lr_text": 1e-4, "no_decay": "openclip4"})
    ),
    "data-whole-optimizer": Case(2, 1, bf16(parallel={"distributed_optimizer": False})),
    "data-sigmoid-ring": Case(2, 1, bf16(loss={"kind": "sigmoid", "exchange": "ring"})),
    "data-infonce-streamed": Case(2, 1, bf16(loss={"exchange": "ring"})),
    "tensor": Case(2, 1, bf16(), tensor=2),
    "tensor-sequence": Case(2, 1, bf16(), tensor=2, sequence=True),
    "tensor-sequence-full": Case(2, 1, bf16(recompute="full"), tensor=2, sequence=True),
    "pipeline-first": Case(2, 0, bf16(), pipeline=2),
    "pipeline-last": Case(2, 1, bf16(), pipeline=2),
    "pipeline-last-two-pass": Case(2, 1, bf16(), pipeline=2, microbatches=4),
    "virtual-last": Case(2, 1, bf16(), pipeline=2, virtual=2),
    "loss-on-all-first": Case(2, 0, bf16(loss={"stages": "all"}), pipeline=2),
    "loss-on-all-last": Case(2, 1, bf16(loss={"stages": "all"}), pipeline=2),
    "all-first": Case(8, 0, bf16(), tensor=2, pipeline=2, sequence=True),
    "all-last": Case(8, 7, bf16(), tensor=2, pipeline=2, sequence=True),
    "siglip-tensor-sequence": Case(
        2, 1, bf16(loss={"kind": "sigmoid"}), tensor=2, sequence=True, vision=SIGLIP
    ),
    "siglip-pipeline-last": Case(2, 1, bf16(), pipeline=2, vision=SIGLIP),
    "pe-core": Case(settings=bf16(recompute="selective"), vision=PE_CORE),
    "pe-core-tensor-full": Case(2, 1, bf16(recompute="full"), tensor=2, vision=PE_CORE),
    "fed-fp32": Case(settings={"precision": "fp32"}, fed=True),
    "fed-bf16": Case(settings=bf16(), fed=True),
    "fed-patch-dropout": Case(settings=bf16(), vision={"patch_dropout": 0.4}, fed=True),
    "fed-tensor-pipeline-reader": Case(4, 0, bf16(), tensor=2, pipeline=2, fed=True),
    "fed-tensor-pipeline-other": Case(4, 3, bf16(), tensor=2, pipeline=2, fed=True),
    "fed-duplicates": Case(2, 1, bf16(loss=OPTIONS), fed=True),
    "fed-duplicates-pipeline": Case(
        4, 3, bf16(loss=OPTIONS | {"stages": "all"}), tensor=2, pipeline=2, fed=True
    ),
    "fed-captions": Case(2, 1, bf16(data=CAPTIONS), fed=True),
    "fed-captions-duplicates-pipeline": Case(
        4, 3, bf16(loss=OPTIONS | {"stages": "all"}, data=CAPTIONS), tensor=2, pipeline=2, fed=True
    ),
}

# Of these the kernels of one layer and microbatch are counted: none has a pipeline.
LAYER_CASES = ["fp32", "bf16", "recompute-full", "data", "tensor-sequence"]
