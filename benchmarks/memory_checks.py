"""Holds what memory_scaling.py counts against real processes and whole stages.

A small model of ours and one of OpenCLIP's run in two gloo processes, and what those hold is
compared to the byte; the planner's quick count of a large model is compared with a dry run of it.
Each raises RuntimeError where they differ.
"""

from __future__ import annotations

import tempfile
from functools import partial
from typing import Any

import memory_openclip as theirs
import open_clip
import torch
import torch.distributed as dist
from memory_counts import Counts, config_for
from memory_fakes import inputs_of, saved_bytes
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from parallel_clip.config import Config
from parallel_clip.engine.groups import close_groups, join_world, make_groups
from parallel_clip.engine.launch import Launch
from parallel_clip.engine.without_gpus import call_without_gpus
from parallel_clip.layout import Layout
from parallel_clip.model.architecture import Architecture
from parallel_clip.model.openclip_json import architecture_from_json
from parallel_clip.plan.layout_plan import LayoutPlan, make_layout_plan
from parallel_clip.plan.memory import dry_run, measure_rank_memory
from parallel_clip.plan.peak_bytes import PeakBytes

PAIRS = 5

_SMALL_TOWER = {"width": 64, "layers": 2}
SMALL = architecture_from_json(
    {
        "embed_dim": 24,
        "vision_cfg": {**_SMALL_TOWER, "image_size": 32, "patch_size": 8, "head_width": 16},
        "text_cfg": {**_SMALL_TOWER, "context_length": 13, "vocab_size": 101, "heads": 4},
    },
    "small",
)


def check_against_processes() -> None:
    """Count the small model in real processes; RuntimeError where the dry run differs."""
    for layout in (Layout(2, tensor=2, sequence=True), Layout(2, pipeline=2)):
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(_count_for_real, (layout, folder), nprocs=layout.world)
            for rank in range(layout.world):
                real = torch.load(f"{folder}/{rank}.pt", weights_only=False)
                dry = dry_run(*_small_case(layout), rank)
                if real != dry:
                    raise RuntimeError(
                        f"rank {rank} of {layout} really holds {real}, the dry run counts {dry}"
                    )


def _small_case(layout: Layout) -> tuple[Config, Architecture, LayoutPlan]:
    config = config_for(layout, "none", pairs=PAIRS)
    return config, SMALL, make_layout_plan(SMALL.costs, layout.world, config)


def _count_for_real(rank: int, layout: Layout, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=layout.world
    )
    join_world(Launch(rank, rank, layout.world))
    found = measure_rank_memory(*_small_case(layout), make_groups(layout))
    torch.save(found, f"{folder}/{rank}.pt")
    close_groups()


def check_against_dry_run(counts: Counts, tensor: int) -> None:
    """A stage of a model by the planner's count and by running it whole."""
    layout = Layout(tensor, tensor, sequence=tensor > 1)
    config = config_for(layout, "none", counts.pairs)
    quick = counts.held(layout, "none")
    whole = dry_run(config, counts.architecture, counts.plan(layout, "none"))
    if (quick.state, quick.saved) != (whole.state, whole.saved):
        raise RuntimeError(
            f"{counts.architecture.name} at tensor {tensor} holds {whole.state} and {whole.saved} "
            f"bytes, the planner counts {quick.state} and {quick.saved}"
        )


# ----------------------------------------------------------------------------- OpenCLIP's model


def check_openclip_against_processes() -> None:
    """OpenCLIP's small model under DDP and FSDP2."""
    counted = call_without_gpus(count_small_openclip)
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_count_openclip_for_real, (folder,), nprocs=2)
        real = torch.load(f"{folder}/0.pt", weights_only=False)
    if real != {name: counted[name] for name in real}:
        raise RuntimeError(f"OpenCLIP's model really holds {real}; counted were {counted}")


def small_openclip(device: str) -> nn.Module:
    with torch.device(device):
        return open_clip.CLIP(**SMALL.json, output_dict=True, nonscalar_logit_scale=True)


def count_small_openclip() -> dict[str, Any]:
    """Bytes of weights, gradients, moments, and of DDP's buckets or of what FSDP2's forward pass
    keeps; "autocast": what DDP's keeps as on a GPU, without and with checkpointing."""
    build = partial(small_openclip, "meta")
    weights = sum(4 * parameter.numel() for parameter in build().parameters())
    shard = 4 * theirs.fsdp2_sharded_numbers(build(), 2)
    saved = theirs.fsdp2_saved(build, False, 2, PAIRS)
    return {
        "ddp": (weights, weights, 2 * weights, theirs.ddp_bucket_bytes(build)),
        "fsdp2": (shard, shard, 2 * shard, saved),
        "autocast": tuple(theirs.ddp_forward(build, again) for again in (False, True)),
    }


def _count_openclip_for_real(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model = small_openclip("cpu")
    with PeakBytes(*model.parameters(), *model.buffers()) as bytes_alive:
        wrapped = DistributedDataParallel(model)
        buckets = bytes_alive.alive
    found = {"ddp": (*_after_a_step(wrapped, model), buckets)}

    model = theirs.fsdp2_wrap(small_openclip("cpu"), init_device_mesh("cpu", (2,)))
    found["fsdp2"] = (*_after_a_step(model, model), saved_bytes(model, PAIRS, "cpu"))
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def _after_a_step(wrapped: nn.Module, model: nn.Module) -> tuple[int, int, int]:
    """Bytes of weights, gradients and moments."""
    optimizer = torch.optim.AdamW(model.parameters())
    features = wrapped(*inputs_of(model, PAIRS, "cpu"))
    sum(value.float().sum() for value in features.values()).backward()
    optimizer.step()
    parameters = list(model.parameters())
    gradients = [parameter.grad for parameter in parameters]
    moments = [
        optimizer.state[parameter][name]
        for parameter in parameters
        for name in ("exp_avg", "exp_avg_sq")
    ]
    return tuple(sum(map(_local_bytes, tensors)) for tensors in (parameters, gradients, moments))


def _local_bytes(tensor: torch.Tensor) -> int:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.nbytes
