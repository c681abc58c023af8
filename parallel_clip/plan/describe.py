"""A job in words: who holds which layers, heads and parameters, and how a step runs."""

from __future__ import annotations

from dataclasses import replace

from parallel_clip.data.feeding.training_data import TrainingData
from parallel_clip.loss.exchange_plan import plan_exchange
from parallel_clip.model.towers.transformer import TowerConfig
from parallel_clip.plan.run_plan import Job


def describe_job(job: Job, steps: int) -> str:
    """Several lines for people."""
    layout, plan, config = job.layout, job.plan, job.config
    lines = [
        f"{job.architecture.name} on {layout.world} process{'es' * (layout.world > 1)}: "
        f"data {layout.data} × tensor {layout.tensor} × pipeline {layout.pipeline}",
        _tower_line(job, "vision", job.architecture.vision),
        _tower_line(job, "text", job.architecture.text),
        f"  batch: {plan.global_batch} pairs = {layout.data} data-parallel × "
        f"{plan.microbatches} microbatch{'es' * (plan.microbatches > 1)} × {plan.micro_batch}; "
        f"{_schedule_words(job)}",
        f"  {config.precision}, recompute {config.recompute}",
        f"  {config.loss.kind}: {_loss_words(job)}",
    ]
    if layout.data > 1:
        split = config.parallel.distributed_optimizer
        lines.append(
            "  optimizer state "
            + ("split over the data-parallel ranks" if split else "whole on every data rank")
        )
    if config.parallel.sequence and layout.tensor == 1:
        lines.append("  parallel.sequence changes nothing at parallel.tensor 1")
    elif config.parallel.sequence:
        lines.append("  sequence parallel: activations split along the tokens, padded to a "
                     f"multiple of {layout.tensor}")  # fmt: skip
    if job.resume.checkpoint is not None:
        lines.append(f"  goes on from {job.resume.checkpoint} (step {job.resume.step})")
    elif config.init.from_ is not None:
        lines.append(f"  starts from {config.init.from_}")
    lines.append(f"  steps: {steps}")
    return "\n".join(lines)


def describe_data(job: Job, data: TrainingData) -> str:
    """A line for each source, and one for all."""
    lines = [
        f"  source {number}: {len(shards):,} shards, {shards.samples:,} samples, weight "
        f"{source.weight:g}: {in_epoch:,} pairs an epoch"
        for number, (source, shards, in_epoch) in enumerate(
            zip(job.config.data.train, data.sources, data.order.source_samples, strict=True)
        )
    ]
    return "\n".join([*lines, f"  an epoch: {data.samples_per_epoch:,} pairs"])


def _tower_line(job: Job, name: str, tower: TowerConfig) -> str:
    tensor = job.layout.tensor
    if len(job.stages) == 1:
        layers = f"layers 0 to {tower.layers - 1} of width {tower.width} on every rank"
    else:
        dealt = ", ".join(str(getattr(stage, name).layers) for stage in job.stages)
        layers = f"{tower.layers} layers of width {tower.width} on the stages: {dealt}"
    return (
        f"  {name}: {layers}; {tower.heads // tensor} of {tower.heads} heads and "
        f"{tower.mlp_width // tensor} of {tower.mlp_width} MLP channels on each tensor rank; "
        f"{tower.tokens} tokens"
    )


def _loss_words(job: Job) -> str:
    settings, layout = job.config.loss, job.layout
    helpers = layout.tensor * (layout.pipeline if job.loss_on_all_stages else 1)
    pairs, width = job.plan.per_rank, job.architecture.embed_dim
    plan = plan_exchange(settings.exchange, settings.tile, pairs, width, layout.data, helpers)
    if settings.kind == "sigmoid":
        plan = replace(plan, stored=False)  # it keeps nothing
    shared = f", shared by {helpers} ranks" if helpers > 1 else ""
    return f"{plan}{shared}"


def _schedule_words(job: Job) -> str:
    count, stash = job.plan.microbatches, job.stash
    if stash == count:
        return "one forward and backward" + (", keeping all graphs" if count > 1 else "")
    if stash == 0:
        return "two-pass: forward for the loss, then forward and backward"
    return f"two-pass, but for {stash} microbatches whose graphs are kept"
