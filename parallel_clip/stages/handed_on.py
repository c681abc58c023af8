"""The shape of what a stage hands on of a tower. No torch."""

from __future__ import annotations

from parallel_clip.stages.stage import LayerRange

Shape = tuple[int, ...]


def handed_on(
    held: LayerRange, count: int, tokens: int, width: int, embed_dim: int, sequence_ranks: int
) -> Shape | None:
    """For `count` pictures or texts of `tokens` each: features [count, embed_dim] where the tower
    has ended, hidden states [S, count, width] where it goes on, None where it has not started.
    sequence_ranks: over how many ranks sequence parallelism splits the tokens (1: it does not)."""
    if held.is_finished:
        return count, embed_dim
    return (-(-tokens // sequence_ranks), count, width) if held.has_started else None
