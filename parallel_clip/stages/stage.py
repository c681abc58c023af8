"""What one stage of a pipeline holds: a range of layers of each tower."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class LayerRange:
    """Layers [first, stop) of a tower of `total`: what one stage holds of it."""

    first: int
    stop: int
    total: int

    @property
    def layers(self) -> int:
        return self.stop - self.first

    @property
    def has_embedding(self) -> bool:
        """Holds the tower's first layer, so its embedding too."""
        return self.layers > 0 and self.first == 0

    @property
    def heads(self) -> bool:
        """Holds the tower's last layer, so its pooling, final norm and projection too."""
        return self.layers > 0 and self.is_finished

    @property
    def has_started(self) -> bool:
        """Something of the tower is handed on to the next stage."""
        return self.stop > 0

    @property
    def is_finished(self) -> bool:
        """What is handed on are features and not hidden states."""
        return self.stop == self.total


@dataclass(frozen=True)
class Stage:
    """One of `count` stages, counted from 0 over all ranks and their chunks."""

    number: int
    count: int
    vision: LayerRange
    text: LayerRange

    @property
    def is_first(self) -> bool:
        return self.number == 0

    @property
    def is_last(self) -> bool:
        return self.number == self.count - 1
