"""A run plan in words: which rank holds which layers, heads and parameters, and how a step runs."""

from __future__ import annotations

from dataclasses import replace
from math import prod

from parallel_clip.config import Loss, parse_bytes, training_sources
from parallel_clip.data.order.reading import machine_reading
from parallel_clip.data.order.run_order import taken_by
from parallel_clip.data.storage.pages import PAGE
from parallel_clip.model.architecture import parameter_table
from parallel_clip.model.layer_groups import layer_groups
from parallel_clip.plan.describe_segments import segment_table
from parallel_clip.plan.prediction import prediction_words
from parallel_clip.plan.run_plan import BlendPlan, RunPlan
from parallel_clip.stages.costs import units_per_rank
from parallel_clip.stages.padding import padding_words


def describe_run(plan: RunPlan) -> str:
    """Several lines for people."""
    layout, batch, config = plan.layout, plan.batch, plan.config
    captions = f", each with {batch.captions} captions" if batch.captions > 1 else ""
    lines = [
        f"{plan.architecture.name} on {layout.world} process{'es' * (layout.world > 1)}: "
        f"data {layout.data} × tensor {layout.tensor} × pipeline {layout.pipeline}",
        _tower_line(plan, "vision"),
        _tower_line(plan, "text"),
        f"  batch: {batch.global_batch} {'pictures' if captions else 'pairs'} = "
        f"{layout.data} data-parallel × "
        f"{batch.microbatches} microbatch{'es' * (batch.microbatches > 1)} × {batch.micro_batch}"
        f"{captions}; {_schedule_words(plan)}",
        f"  {config.precision}, recompute {config.recompute}",
        f"  {config.loss.kind}{_loss_options(config.loss)}: {_loss_words(plan)}",
    ]
    lines += _frozen_lines(plan)
    costs = plan.architecture.costs.with_captions(batch.captions)
    padding = padding_words(costs, layout.tensor)
    if padding is not None:
        lines.append(f"  parallel.pad: {padding}")
    if layout.data > 1:
        split = config.parallel.distributed_optimizer
        lines.append(
            "  optimizer state "
            + ("split over the data-parallel ranks" if split else "whole on every data rank")
        )
    if config.ema.decay is not None:
        every = f", after every {config.ema.every} updates" if config.ema.every > 1 else ""
        lines.append(f"  averages of the weights: decay {config.ema.decay:g}{every}")
    if config.parallel.sequence and layout.tensor == 1:
        lines.append("  parallel.sequence changes nothing at parallel.tensor 1")
    elif config.parallel.sequence:
        lines.append(
            "  sequence parallel: activations split along the tokens, padded to a multiple of "
            f"{layout.tensor}"
        )
    if plan.resume.checkpoint is not None:
        lines.append(f"  goes on from {plan.resume.checkpoint} (step {plan.resume.step})")
    elif plan.initial is not None:
        lines.append(f"  starts from {plan.initial}")
    lines += [f"  {words}" for words in plan.logits.words]
    lines += [f"  {note}" for note in plan.notes]
    if plan.prediction is not None:
        sizes = layout.pipeline, batch.global_batch
        lines += [f"  {words}" for words in prediction_words(plan.prediction, *sizes)]
    lines.append(f"  steps: {plan.steps}")
    lines += segment_table(plan)
    return "\n".join(lines)


def describe_data(plan: RunPlan) -> str:
    """A line for each source, and one for all; for each blend of sources, where phases have
    several."""
    found = training_sources(plan.config)
    taken = taken_by(plan.stretches, plan.steps * plan.batch.global_batch)
    lines = []
    for number, (weights, blend) in enumerate(zip(found.blends, plan.blends, strict=True)):
        for source, counted in enumerate(plan.data_fingerprint["sources"]):
            if weights[source]:
                lines.append(
                    f"  source {source}: {counted['shards']:,} shards, {counted['samples']:,} "
                    f"samples, weight {weights[source]:g}: {blend.pairs[source]:,} pairs an epoch"
                )
        line = f"  an epoch: {blend.epoch:,} pairs"
        if len(plan.blends) > 1:
            line += f"; {taken[number] / blend.epoch:.4g} epochs{_of_phases(plan, number)}"
        lines.append(line)
    return "\n".join(lines)


def _of_phases(plan: RunPlan, blend: int) -> str:
    """' of phases 0 and 2', where phases have different blends."""
    if len(plan.blends) == 1:
        return ""
    numbers = training_sources(plan.config).phases_of(blend)
    return f" of phase{'s' * (len(numbers) > 1)} {' and '.join(map(str, numbers))}"


def describe_reading(plan: RunPlan, ranks_per_machine: int) -> list[str]:
    """How much a machine reads, and whether the cache is large enough for it."""
    lines = []
    for number, blend in enumerate(plan.blends):
        lines += _reading_lines(plan, blend, _of_phases(plan, number), ranks_per_machine)
    return lines


def _reading_lines(
    plan: RunPlan, reading: BlendPlan, of_phases: str, ranks_per_machine: int
) -> list[str]:
    layout, cache = plan.layout, plan.config.data.cache
    if reading.sample_bytes is None:
        return []
    # In the order of ranks, those of the first pipeline stage, which read, come first.
    machines = max(1, -(-layout.data * layout.tensor // ranks_per_machine))
    found = machine_reading(
        reading.epoch,
        reading.streams,
        reading.sample_bytes,
        machines,
        PAGE if reading.is_fetched else 1,
    )
    line = f"  reading: {_gigabytes(found.own * machines)} an epoch{of_phases}"
    if machines > 1:
        each = _gigabytes(found.own)
        line += f"; {machines} machines of {ranks_per_machine} processes, each {each}"
    if not reading.is_fetched:
        return [line]
    kept = parse_bytes(cache, "data.cache")
    lines = [
        f"{line}, fetched in pages {_gigabytes(found.fetched)}, of which "
        f"{_gigabytes(found.in_use)} are in use at a time (data.cache: {cache})"
    ]
    if found.in_use > 0.9 * kept:
        again = 1 + PAGE / reading.sample_bytes
        lines.append(
            f"  data.cache={cache} is less than what is in use: pages are fetched again and again, "
            f"up to {again:.0f} times the samples' bytes; set data.cache to "
            f"{_gigabytes(1.2 * found.in_use)} or more, where the disk has it"
        )
    return lines


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"


def _tower_line(plan: RunPlan, name: str) -> str:
    tower, tensor = getattr(plan.architecture, name), plan.layout.tensor
    split = tower.costs(plan.architecture.embed_dim).split_units
    *shares, last = (f"{units_per_rank(u.count, tensor)} of {u.count} {u.name}" for u in split)
    uneven = any(units.count % tensor for units in split)
    stages = plan.layout_plan.stages
    if len(stages) == 1:
        layers = f"layers 0 to {tower.layers - 1} of width {tower.width} on every rank"
    else:
        dealt = ", ".join(str(getattr(stage, name).layers) for stage in stages)
        layers = f"{tower.layers} layers of width {tower.width} on the stages: {dealt}"
    return (
        f"  {name}: {layers}; {', '.join(shares)} and {last} on each tensor rank"
        f"{', or fewer' if uneven else ''}; {tower.tokens} tokens"
    )


def _frozen_lines(plan: RunPlan) -> list[str]:
    """What is not trained, a line a tower."""
    sizes = {p.name: prod(p.shape) for p in parameter_table(plan.architecture)}
    towers = layer_groups(plan.architecture)
    lines = []
    for tower in ("vision", "text"):
        frozen, groups = getattr(plan.frozen, tower), getattr(towers, tower)
        if not frozen.names:
            continue
        size = sum(sizes[name] for name in frozen.names) / 1e6
        whole = sum(sizes[name] for name in groups.number) / 1e6
        if frozen.whole:
            how = f"all of its {whole:.2f} M parameters; it runs once a step, forward"
        else:
            layers = getattr(plan.architecture, tower).layers
            how = (
                f"{size:.2f} of its {whole:.2f} M parameters; backward passes "
                f"{layers - frozen.layers.without_backward} of {layers} layers"
            )
        lines.append(f"  freeze.{tower}: {how}")
    return lines


def _loss_options(settings: Loss) -> str:
    smoothing, duplicates = settings.label_smoothing, settings.duplicates
    words = f" with label smoothing {smoothing:g}" if smoothing else ""
    if duplicates != "none":
        words += f"{' and' if words else ' with'} duplicates left out by {duplicates}"
    return words


def _loss_words(plan: RunPlan) -> str:
    exchange, helpers = plan.layout_plan.exchange, plan.layout_plan.loss_helpers
    if plan.config.loss.kind == "sigmoid":
        exchange = replace(exchange, stored=False)  # it keeps nothing
    return f"{exchange}" + (f", shared by {helpers} ranks" if helpers > 1 else "")


def _schedule_words(plan: RunPlan) -> str:
    count, stash = plan.batch.microbatches, plan.layout_plan.stash
    if stash == count:
        return "one forward and backward" + (", keeping all graphs" if count > 1 else "")
    if stash == 0:
        return "two-pass: forward for the loss, then forward and backward"
    return f"two-pass, but for {stash} microbatches whose graphs are kept"
