"""The sources that a run trains on, and with which weights each of its phases mixes them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from parallel_clip.config.keys import Config, DataSource

Blend = tuple[float, ...]  # the weight of each source of a run; 0: it is not in the blend


@dataclass(frozen=True)
class TrainingSources:
    """sources: each once, numbered in the order in which phases first use them; keys: where the
    config first names each, such as data.train.0; blends: those that differ, in the order of their
    first phase; of_phase: the number of each phase's blend, of one phase where there are none.

    A source is the same one in several phases where all but its weight is equal, by the text of the
    config. Of equal ones in one phase the second is another source.
    """

    sources: tuple[DataSource, ...]
    keys: tuple[str, ...]
    blends: tuple[Blend, ...]
    of_phase: tuple[int, ...]

    def phases_of(self, blend: int) -> list[int]:
        """The numbers of the phases that have a blend."""
        return [phase for phase, number in enumerate(self.of_phase) if number == blend]


def training_sources(config: Config) -> TrainingSources:
    """What `data.train` and `phases.*.sources` say together."""
    sources: list[DataSource] = []
    keys: list[str] = []
    found: list[dict[int, float]] = []
    for listed, key in _lists(config):
        weights: dict[int, float] = {}
        for place, source in enumerate(listed):
            same = [n for n, other in enumerate(sources) if _is_same(source, other)]
            number = next((n for n in same if n not in weights), len(sources))
            if number == len(sources):
                sources.append(source)
                keys.append(f"{key}.{place}")
            weights[number] = source.weight
        found.append(weights)
    whole = [tuple(weights.get(n, 0.0) for n in range(len(sources))) for weights in found]
    blends = tuple(dict.fromkeys(whole))
    return TrainingSources(
        tuple(sources), tuple(keys), blends, tuple(blends.index(blend) for blend in whole)
    )


def _lists(config: Config) -> Iterator[tuple[list[DataSource], str]]:
    """The sources of each phase, and where the config has them."""
    if not config.phases:
        yield config.data.train, "data.train"
    for number, phase in enumerate(config.phases):
        if phase.sources is None:
            yield config.data.train, "data.train"
        else:
            yield phase.sources, f"phases.{number}.sources"


def _is_same(source: DataSource, other: DataSource) -> bool:
    return source == other.model_copy(update={"weight": source.weight})


def check_blends(config: Config) -> Iterator[str]:
    """What is wrong with the sources of a run and its phases."""
    phases, named = config.phases, bool(config.data.train)
    missing = [number for number, phase in enumerate(phases) if phase.sources is None]
    if named and phases and not missing:
        yield (
            "data.train is of no use, as each of the phases has sources; leave it out, or one of "
            "these"
        )
    if not named and (missing or not phases):
        of = f", and phases.{missing[0]} has no sources" if len(missing) < len(phases) else ""
        yield (
            f"data.train names no shards{of}; give some, e.g. "
            "data.train.0.shards=shards/{0..9}.tar"
        )
    for number, phase in enumerate(phases):
        if phase.sources == []:
            yield f"phases.{number}.sources is empty; name some, or leave it out for data.train"
    if config.train.epochs is not None and len(training_sources(config).blends) > 1:
        yield (
            f"train.epochs {config.train.epochs:g} counts passes over the sources, and phases have "
            "different ones; give train.samples or train.steps"
        )
