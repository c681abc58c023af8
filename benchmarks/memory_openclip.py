"""What a GPU holds that trains OpenCLIP's own model with DDP or FSDP2, counted on fake tensors.

`open_clip`'s modules run under a fake process group, as ours do. Which tensors autocast makes
depends on the device, so that DDP's forward pass runs on fake tensors of a GPU, with the attention
that PyTorch takes there; FSDP2, which uses no autocast, on those of a CPU. What cannot run there is
said beside it and checked against real processes (memory_checks.py).

Mixed precision is that of the trainers: for DDP `--precision amp_bf16`, fp32 weights with autocast;
for FSDP2, which OpenCLIP 3.3 has no option for, `fully_shard` for each block and for the rest, with
`MixedPrecisionPolicy(param_dtype=bfloat16, reduce_dtype=float32)`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import open_clip
import torch
from memory_fakes import Build, fake_group, fake_model, inputs_of, saved_bytes
from open_clip.loss import ClipLoss
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from parallel_clip.plan.peak_bytes import PeakBytes

POLICY = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
# Of what FSDPMemTracker tells apart: weights gathered, and what is on its way between ranks.
_GATHERED = "Unsharded Param"
_ON_THE_WAY = "All Gather", "Reduce Scatter", "Unsharded Grad"

NODE = 8  # GPUs of the world in which FSDP2 runs
FEW_AND_MORE = 4, 8  # pairs of two forward passes, which tell a pair's bytes from constant ones


@dataclass(frozen=True)
class Forward:
    """What a forward pass keeps for backward: of each pair, and whatever their number."""

    of_a_pair: int
    constant: int


@dataclass(frozen=True)
class Fsdp2Step:
    """Of a whole step: weights gathered, and other buffers of communication, when most is held,
    and all that is held then; by torch's own FSDPMemTracker."""

    gathered: int
    on_the_way: int
    peak: int


@dataclass(frozen=True)
class OpenClipCounts:
    """Of one model, bytes but for `numbers`.

    numbers: of its parameters; sharded_numbers: of those that FSDP2 leaves to a rank, by GPUs;
    ddp, fsdp2, steps: without and with `--grad-checkpointing`; loss: by pairs a GPU and GPUs.
    """

    numbers: int
    sharded_numbers: dict[int, int]
    buckets: int
    ddp: tuple[Forward, Forward]
    fsdp2: tuple[Forward, Forward]
    steps: tuple[Fsdp2Step, Fsdp2Step]
    loss: dict[tuple[int, int], int]


def count_openclip(
    name: str, pairs: int, worlds: Sequence[int], losses: Sequence[tuple[int, int]]
) -> OpenClipCounts:
    """pairs: of a microbatch; losses: pairs a GPU and GPUs. In a process in which ours has not run:
    without a GPU its seam makes CPU tensors of those of a GPU.

    Raises:
        RuntimeError: FSDP2 leaves other parameters to a rank than what is computed here.
    """
    build = partial(openclip_model, name)
    model = build()
    sharded = {gpus: fsdp2_sharded_numbers(model, gpus) for gpus in {*worlds, NODE}}
    if fsdp2_local_bytes(build, NODE) != 4 * sharded[NODE]:
        raise RuntimeError(f"FSDP2 does not leave {4 * sharded[NODE]} bytes of {name} to a rank")
    width = open_clip.get_model_config(name)["embed_dim"]
    both = False, True
    return OpenClipCounts(
        sum(parameter.numel() for parameter in model.parameters()),
        sharded,
        ddp_bucket_bytes(build),
        tuple(ddp_forward(build, again) for again in both),
        tuple(fsdp2_forward(build, again, NODE) for again in both),
        tuple(fsdp2_step(build, again, NODE, pairs) for again in both),
        {sizes: loss_bytes(width, *sizes) for sizes in losses},
    )


def openclip_model(name: str) -> nn.Module:
    """On the meta device, with random weights' shapes and no values."""
    logging.disable(logging.WARNING)  # that it has no pretrained weights
    try:
        with torch.device("meta"):
            # FSDP2 takes no parameters without a dimension; OpenCLIP has this for its sake.
            return open_clip.create_model(
                name, device="meta", output_dict=True, nonscalar_logit_scale=True
            )
    finally:
        logging.disable(logging.NOTSET)


def _per_pair(saved: Sequence[int]) -> Forward:
    """From what passes of FEW_AND_MORE pairs keep."""
    few, more = FEW_AND_MORE
    of_a_pair = (saved[1] - saved[0]) // (more - few)
    return Forward(of_a_pair, saved[0] - few * of_a_pair)


# --------------------------------------------------------------------------------------- DDP


def ddp_forward(build: Build, checkpointing: bool) -> Forward:
    """Of fp32 weights under bf16 autocast. constant: above all the bf16 copies of weights that
    autocast makes once a pass, and backward needs."""
    with fake_model(build, "cuda", checkpointing) as model:
        return _per_pair([saved_bytes(model, pairs, "cuda") for pairs in FEW_AND_MORE])


def ddp_bucket_bytes(build: Build) -> int:
    """Of the buckets in which DDP sums gradients, beside the gradients themselves (OpenCLIP leaves
    gradient_as_bucket_view off)."""
    with fake_group(2), fake_model(build, "cpu") as model:
        with PeakBytes(*model.parameters(), *model.buffers()) as bytes_alive:
            # Without init_sync it does not ask the other ranks for the shapes of their parameters,
            # which takes values. Its backward pass cannot run on fake tensors.
            wrapped = DistributedDataParallel(model, init_sync=False)
            found = bytes_alive.alive
        del wrapped
        return found


# ------------------------------------------------------------------------------------- FSDP2


def fsdp2_wrap(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """`fully_shard` for each block of both towers and for what is left."""
    for name, module in list(model.named_modules()):
        if name.split(".")[-2:-1] in (["resblocks"], ["blocks"]):
            fully_shard(module, mesh=mesh, mp_policy=POLICY)
    return fully_shard(model, mesh=mesh, mp_policy=POLICY)


def fsdp2_forward(build: Build, checkpointing: bool, ranks: int) -> Forward:
    """constant: above all weights of the last group, which stay gathered until backward."""
    # A model for each pass: after one without backward the last group is gathered already.
    return _per_pair([fsdp2_saved(build, checkpointing, ranks, pairs) for pairs in FEW_AND_MORE])


def fsdp2_saved(build: Build, checkpointing: bool, ranks: int, pairs: int) -> int:
    with fake_fsdp2(build, ranks, checkpointing) as model:
        return saved_bytes(model, pairs, "cpu")


def fsdp2_step(build: Build, checkpointing: bool, ranks: int, pairs: int) -> Fsdp2Step:
    """A step of AdamW on `pairs` a rank, counted by torch."""
    with fake_fsdp2(build, ranks, checkpointing) as model:
        optimizer = torch.optim.AdamW(model.parameters())
        for parameter in model.parameters():  # so that it makes its moments
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
        images, texts = inputs_of(model, pairs, "cpu")
        tracker = FSDPMemTracker(model, optimizer)
        tracker.track_inputs((images, texts))
        with tracker:
            found = model(images, texts)
            (
                found["image_features"].float().sum() + found["text_features"].float().sum()
            ).backward()
            del found
            optimizer.step()
        (kinds,) = tracker.get_tracker_snapshot("peak").values()
        sizes = {str(getattr(kind, "value", kind)): size for kind, size in kinds.items()}
        on_the_way = sum(sizes[kind] for kind in _ON_THE_WAY)
        return Fsdp2Step(sizes[_GATHERED], on_the_way, sizes["Total"])


def fsdp2_sharded_numbers(model: nn.Module, ranks: int) -> int:
    """Numbers of the parameters of the rank that holds most: the first dimension is cut into whole
    rows."""
    return sum(
        -(-parameter.shape[0] // ranks) * parameter[0].numel() for parameter in model.parameters()
    )


def fsdp2_local_bytes(build: Build, ranks: int) -> int:
    """Of the first rank's fp32 parameters, as the wrapper cuts them."""
    with fake_fsdp2(build, ranks) as model:
        return sum(parameter.to_local().nbytes for parameter in model.parameters())


@contextmanager
def fake_fsdp2(build: Build, ranks: int, checkpointing: bool = False) -> Iterator[nn.Module]:
    with fake_group(ranks):
        mesh = init_device_mesh("cpu", (ranks,))
        with fake_model(build, "cpu", checkpointing) as model:
            yield fsdp2_wrap(model, mesh)


# -------------------------------------------------------------------------------------- loss


def loss_bytes(width: int, pairs: int, ranks: int) -> int:
    """The most that `ClipLoss(local_loss=True, gather_with_grad=True)` holds beside features and
    their gradients, forward and backward, of `pairs` a rank under bf16 autocast."""
    with fake_group(ranks), FakeTensorMode(allow_non_fake_inputs=True):
        loss = ClipLoss(local_loss=True, gather_with_grad=True, world_size=ranks)
        features = [torch.zeros(pairs, width, requires_grad=True) for _ in range(2)]
        scale = torch.ones((), requires_grad=True)
        with PeakBytes(*features, scale) as bytes_alive:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                found = loss(*features, scale)
            found.backward()
        return bytes_alive.peak
