"""How a loss exchanges texts and tiles its logits, decided from sizes alone. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Exchange = Literal["auto", "gather", "ring"]

# Gathered texts with their fp32 gradients are held whole up to so many bytes; beyond, they stream.
GATHER_BYTES = 2 << 30
# A chunk's block of logits takes about so many bytes.
TILE_BYTES = 32 << 20
LEAST_TILE, LARGEST_TILE = 128, 4096


@dataclass(frozen=True)
class ExchangePlan:
    """How a loss is computed. gathered: all texts are held at once; `tile`: columns of logits that
    are worked on at a time; stored: the logits are kept for the gradient and not computed again."""

    gathered: bool
    tile: int
    stored: bool

    def __str__(self) -> str:
        texts = "texts gathered" if self.gathered else "texts streamed"
        return f"{texts}, logits " + ("kept" if self.stored else f"in tiles of {self.tile} columns")


def plan_exchange(
    exchange: Exchange,
    tile: int | Literal["auto"],
    pairs: int,
    width: int,
    ranks: int,
    helpers: int,
    captions: int = 1,
) -> ExchangePlan:
    """Choose `exchange` and `tile` by size where they are "auto". A tile holds all captions of its
    pictures.

    pairs: b; width: D; ranks: N; helpers: H; captions: k, texts of each picture. Logits are kept
    where they take no more memory than gathered texts and their gradients do, b × B·k / H numbers
    against 2 × B·k × D, or than a tile.
    """
    texts = pairs * ranks * captions
    texts_bytes = 4 * 2 * texts * width
    block_bytes = 4 * pairs * texts // helpers
    gathered = exchange == "gather"
    if exchange == "auto":
        gathered = texts_bytes // helpers <= GATHER_BYTES
    stored = tile == "auto" and gathered and block_bytes <= max(texts_bytes, TILE_BYTES)
    if tile == "auto":
        room = TILE_BYTES // (4 * pairs)
        if not stored:  # the few blocks and chunks at work take little more than the features do
            room = min(room, pairs, 2 * width)
        tile = max(LEAST_TILE, min(LARGEST_TILE, room))
    tile = captions * max(1, tile // captions)
    return ExchangePlan(gathered, tile, stored)


def peak_loss_bytes(
    plan: ExchangePlan, pairs: int, width: int, ranks: int, helpers: int, captions: int = 1
) -> int:
    """An upper bound of the bytes that a loss holds at once beside the features given to it, with
    duplicates and label smoothing or without: of three tiles two are logits at work, and a mask of
    bools is a quarter of one; identities and what is counted of them are among the 16 · B·k."""
    own_texts = pairs * captions
    texts = own_texts * ranks
    columns = min(plan.tile, texts)
    numbers = (3 * pairs + 2 * own_texts) * width
    numbers += 3 * pairs * columns + 2 * columns * width + 16 * texts
    if plan.gathered:
        numbers += 2 * texts * width // helpers
    if plan.stored:
        numbers += pairs * texts // helpers
    return 4 * numbers
