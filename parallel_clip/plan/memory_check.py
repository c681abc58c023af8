"""`plan.check`: what to say of a run whose ranks would need more memory than they have."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from parallel_clip.config import Config
from parallel_clip.engine.device import has_cuda
from parallel_clip.engine.groups import has_joined
from parallel_clip.engine.without_gpus import call_without_gpus
from parallel_clip.errors import InputError
from parallel_clip.model.architecture import Architecture
from parallel_clip.plan.build import frozen_parts
from parallel_clip.plan.device_file import Device, read_device
from parallel_clip.plan.layout_plan import choose_stash, stash_is_open
from parallel_clip.plan.memory_limit import MemoryLimit
from parallel_clip.plan.prediction import Prediction, memory_words
from parallel_clip.plan.rank_process import RankProcess
from parallel_clip.plan.search import LayoutSearch, PlannedLayout, RefusedLayout
from parallel_clip.plan.step_time import predict_step

SHOWN = 3
# By whose figures layouts are ranked where those of the device at hand are not known.
USUAL_DEVICE = "h100"


@dataclass(frozen=True)
class Shortage:
    """A run that does not fit. config, architecture: of the part of it that needs most; others: of
    its other parts; world: ranks; machine_ranks: of a machine; device: None: not known."""

    prediction: Prediction
    config: Config
    architecture: Architecture
    others: tuple[tuple[Config, Architecture], ...]
    world: int
    machine_ranks: int
    process: RankProcess
    device: Device | None


def shortage_words(shortage: Shortage) -> str:
    """What is needed, what there is, and up to three layouts of as many ranks that fit, or what
    else would do. Takes a search for layouts."""
    prediction, limit = shortage.prediction, shortage.prediction.limit
    lines = [
        f"stage {prediction.stage} needs more memory than there is: {memory_words(prediction)}"
    ]
    found, least = find_layouts(shortage)
    if found:
        device = shortage.device.name if shortage.device is not None else USUAL_DEVICE
        lines.append(
            f"These fit, the quickest first by the figures of {device}, and train the same; as "
            "overrides, or keys of the config:"
        )
        lines += [f"  {override_words(shortage.config, each)}" for each in found]
    else:
        lines.append(_nothing_fits(shortage.world, limit, least))
    lines.append("This is a prediction (docs/planning.md); plan.check=warn trains in spite of it")
    return "\n".join(lines)


def _nothing_fits(world: int, limit: MemoryLimit, least: RefusedLayout | None) -> str:
    processes = f"{world} process{'es' * (world > 1)}"
    more = f"start more processes, with memory of their own, than {world}, or lower batch.global"
    if least is None or least.needs_bytes <= limit.size:  # that is one of its parts alone
        return f"No layout of {processes} fits; {more}"
    parallel = least.config.parallel
    return (
        f"No layout of {processes} fits: the least is {least.needs_bytes / 1e9:.2f} GB, for "
        f"tensor {parallel.tensor} x pipeline {parallel.pipeline}, batch.micro "
        f"{least.config.batch.micro}, recompute {least.config.recompute}; {more}"
    )


# ------------------------------------------------------------------------------ layouts that fit


def find_layouts(shortage: Shortage) -> tuple[list[PlannedLayout], RefusedLayout | None]:
    """Layouts in which all parts of the run fit, the quickest first, and the one that needs least
    of those that do not."""
    if has_cuda() or has_joined():
        return call_without_gpus(find_layouts, shortage)
    limit = shortage.prediction.limit
    least = None
    # Where there is a margin for what is estimated, it is kept if it can be.
    for size in sorted({limit.to_fill or limit.size, limit.size}):
        result = _search(shortage, shortage.config, shortage.architecture, size).run()
        others = [_search(shortage, *other, size) for other in shortage.others]
        found: list[PlannedLayout] = []
        for layout in _varied(result.layouts):
            if all(_fits(other, layout) for other in others):
                found.append(layout)
            if len(found) == SHOWN:
                break
        if found:
            return found, None
        refused = [each for each in result.refused if each.needs_bytes is not None]
        least = min(refused, key=lambda each: each.needs_bytes, default=None)
    return [], least


def _search(
    shortage: Shortage, config: Config, architecture: Architecture, limit: int
) -> LayoutSearch:
    device = shortage.device or read_device(USUAL_DEVICE)
    nodes_of = min(shortage.machine_ranks, shortage.world)
    costs = frozen_parts(architecture, config.freeze).costs_of(architecture)
    predict = partial(
        predict_step, architecture=architecture, device=device, nodes_of=nodes_of, costs=costs
    )
    sizes = shortage.world, limit, nodes_of
    return LayoutSearch(config, architecture, *sizes, predict, shortage.process)


def _varied(layouts: Sequence[PlannedLayout]) -> Iterator[PlannedLayout]:
    """The quickest of each tensor and pipeline size, then of each recomputation beside, then the
    rest."""
    seen: set[int] = set()
    for key in (_sizes, lambda found: (_sizes(found), found.config.recompute), id):
        known = {key(layouts[number]) for number in seen}
        for number, found in enumerate(layouts):
            if key(found) not in known:
                known.add(key(found))
                seen.add(number)
                yield found


def _sizes(found: PlannedLayout) -> tuple[int, int]:
    layout = found.plan.layout
    return layout.tensor, layout.pipeline


def _fits(search: LayoutSearch, layout: PlannedLayout) -> bool:
    """Whether another part of the run fits in a layout, too."""
    parallel, batch = layout.config.parallel, layout.config.batch
    update = {"parallel": parallel, "batch": batch, "recompute": layout.config.recompute}
    try:
        return isinstance(search.one(search.config.model_copy(update=update)), PlannedLayout)
    except InputError:
        return False


def override_words(config: Config, found: PlannedLayout) -> str:
    """The keys in which a layout differs from the config, as overrides of the command line."""
    wanted, own = _layout_keys(found.config), _layout_keys(config)
    if _keeps_graphs(config, found) == found.plan.stash:
        keys = "parallel.schedule", "parallel.stash"
        wanted |= {key: own[key] for key in keys}
    elif wanted["parallel.schedule"] != "auto":
        wanted["parallel.stash"] = "auto"  # the schedule says it
    if found.plan.layout.data == 1:  # nothing to split
        wanted["parallel.distributed_optimizer"] = own["parallel.distributed_optimizer"]
    words = (
        f"{key}={'null' if value is None else str(value).lower()}"
        for key, value in wanted.items()
        if value != own[key]
    )
    return " ".join(words)


def _keeps_graphs(config: Config, found: PlannedLayout) -> int | None:
    """The microbatches whose graphs a config keeps in another layout whatever the memory; None:
    that hangs on it, or its stash is too large there."""
    parallel = config.parallel.model_copy(update={"pipeline": found.plan.layout.pipeline})
    if stash_is_open(parallel) and (has_cuda() or parallel.memory is not None):
        return None
    try:
        return choose_stash(parallel, found.plan.batch.microbatches)
    except InputError:
        return None


def _layout_keys(config: Config) -> dict[str, Any]:
    parallel = config.parallel.model_dump(exclude={"memory"})
    return {f"parallel.{key}": value for key, value in parallel.items()} | {
        "batch.micro": config.batch.micro,
        "recompute": config.recompute,
    }
