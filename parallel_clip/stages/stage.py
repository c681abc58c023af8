"""What one stage of a pipeline holds: a range of layers of each tower."""

from __future__ import annotations

from dataclasses import dataclass


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
        """Whether it holds the tower's first layer, and so its embedding."""
        return self.layers > 0 and self.first == 0

    @property
    def has_head(self) -> bool:
        """Whether it holds the tower's last layer, and so its final norm, pooling, projection."""
        return self.layers > 0 and self.is_finished

    @property
    def has_started(self) -> bool:
        """Whether something of the tower is handed on to the next stage."""
        return self.stop > 0

    @property
    def is_finished(self) -> bool:
        """Whether features are handed on, and not hidden states."""
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


def whole_model(vision_layers: int, text_layers: int) -> Stage:
    """The only stage of a pipeline of one."""
    vision, text = (LayerRange(0, layers, layers) for layers in (vision_layers, text_layers))
    return Stage(0, 1, vision, text)
