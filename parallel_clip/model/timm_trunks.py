"""The image trunks of timm 1.0 that are built here, by timm's names: facts about their shapes."""

from __future__ import annotations

from typing import Literal, NamedTuple

from parallel_clip.model.rotary import RotaryGrid
from parallel_clip.model.towers.transformer import Activation


class TrunkSize(NamedTuple):
    width: int
    layers: int
    heads: int
    mlp_ratio: float = 4.0


class Trunk(NamedTuple):
    """size; patch_size in pixels; activation of the blocks and, but for PE-Core, of the pool;
    class_token; pre_norm: a norm before the first block; pool: what the trunk pools by unless it is
    told otherwise; pool_heads, pool_mlp_ratio: None where they are the blocks'; rotary."""

    size: TrunkSize
    patch_size: int
    norm_eps: float
    activation: Activation = "gelu"
    class_token: bool = False
    pre_norm: bool = False
    pool: Literal["map", "token"] = "map"
    pool_heads: int | None = None
    pool_mlp_ratio: float | None = None
    rotary: RotaryGrid | None = None


TINY = TrunkSize(192, 12, 3)
SMALL = TrunkSize(384, 12, 6)
BASE = TrunkSize(768, 12, 12)
LARGE = TrunkSize(1024, 24, 16)
SO400M = TrunkSize(1152, 27, 16, 3.7362)
GIANT = TrunkSize(1536, 40, 16)
GIGANTIC = TrunkSize(1536, 50, 16, 8960 / 1536)


def _siglip(size: TrunkSize, patch_size: int, activation: Activation = "gelu") -> Trunk:
    return Trunk(size, patch_size, 1e-6, activation)


def _pe_core(
    size: TrunkSize, patch_size: int, grid: int, *, class_token: bool = True, offset: float = 1.0
) -> Trunk:
    """grid: patches down and across of the pictures that the trunk was trained on."""
    return Trunk(
        size,
        patch_size,
        norm_eps=1e-5,
        class_token=class_token,
        pre_norm=True,
        pool_heads=8,
        pool_mlp_ratio=4.0,
        rotary=RotaryGrid((grid, grid), offset),
    )


def _clip(size: TrunkSize, patch_size: int) -> Trunk:
    return Trunk(size, patch_size, 1e-5, class_token=True, pre_norm=True, pool="token")


TRUNKS = {
    "vit_base_patch32_siglip_256": _siglip(BASE, 32, "gelu_tanh"),
    "vit_base_patch16_siglip_224": _siglip(BASE, 16),
    "vit_base_patch16_siglip_256": _siglip(BASE, 16),
    "vit_base_patch16_siglip_384": _siglip(BASE, 16),
    "vit_base_patch16_siglip_512": _siglip(BASE, 16),
    "vit_large_patch16_siglip_256": _siglip(LARGE, 16),
    "vit_large_patch16_siglip_384": _siglip(LARGE, 16),
    "vit_large_patch16_siglip_512": _siglip(LARGE, 16, "gelu_tanh"),
    "vit_so400m_patch14_siglip_224": _siglip(SO400M, 14),
    "vit_so400m_patch14_siglip_378": _siglip(SO400M, 14),
    "vit_so400m_patch14_siglip_384": _siglip(SO400M, 14),
    "vit_so400m_patch16_siglip_256": _siglip(SO400M, 16, "gelu_tanh"),
    "vit_so400m_patch16_siglip_384": _siglip(SO400M, 16, "gelu_tanh"),
    "vit_so400m_patch16_siglip_512": _siglip(SO400M, 16, "gelu_tanh"),
    "vit_giantopt_patch16_siglip_256": _siglip(GIANT, 16, "gelu_tanh"),
    "vit_giantopt_patch16_siglip_384": _siglip(GIANT, 16, "gelu_tanh"),
    "vit_pe_core_tiny_patch16_384": _pe_core(TINY, 16, 24),
    "vit_pe_core_small_patch16_384": _pe_core(SMALL, 16, 24),
    "vit_pe_core_base_patch16_224": _pe_core(BASE, 16, 14),
    "vit_pe_core_large_patch14_336": _pe_core(LARGE, 14, 24),
    "vit_pe_core_gigantic_patch14_448": _pe_core(GIGANTIC, 14, 32, class_token=False, offset=0.0),
    "vit_base_patch32_clip_224": _clip(BASE, 32),
    "vit_base_patch16_clip_224": _clip(BASE, 16),
    "vit_large_patch14_clip_224": _clip(LARGE, 14),
    "vit_large_patch14_clip_336": _clip(LARGE, 14),
}


def trunk_size(name: str) -> int:
    """The side in pixels of the pictures that timm builds a trunk for."""
    return int(name.rpartition("_")[2])
