"""The plain thing that training is compared with: open_clip, one process, one batch, AdamW.

Nothing here uses parallel_clip. The functions make a small checkpoint and a small data set on disk,
read the data set back as one batch, and train OpenCLIP's own model on it step by step.
"""

import functools
import io
import json
import math
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple
from unittest import mock

import numpy as np
import open_clip
import timm
import torch
from open_clip.loss import ClipLoss, SigLipLoss
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Precision = Literal["fp32", "amp_bf16", "pure_bf16"]

# Not OpenCLIP's defaults, so that a run which ignores the checkpoint's own preprocessing shows.
PREPROCESS = {"mean": [0.45, 0.5, 0.4], "std": [0.3, 0.25, 0.28], "interpolation": "bilinear"}

COLOURS = ["red", "orange", "yellow", "green", "teal", "blue", "purple", "pink", "white", "grey"]
SHAPES = ["circle", "square", "ring", "frame", "bar"]
PLACES = ["near the top", "near the bottom", "on the left", "on the right", "in the middle"]


class Sample(NamedTuple):
    """Where a sample of a batch came from: the shard's file name and the sample's key in it."""

    shard: str
    key: str


class Batch(NamedTuple):
    """images [B, 3, H, W] fp32, texts [B, L] int64, and where each of the B came from."""

    images: Tensor
    texts: Tensor
    samples: list[Sample]


class Reference(NamedTuple):
    """One record a step (loss, grad_norm, logit_scale, logit_bias, lr), the final weights, and
    their average where one was asked for."""

    steps: list[dict[str, float | None]]
    weights: dict[str, Tensor]
    averages: dict[str, Tensor] = {}


class FedPatchDropout(nn.Module):
    """In the place of OpenCLIP's or timm's PatchDropout: keeps the patches that it is told to."""

    kept: Tensor  # [B, K] int64, sorted, without the class token

    def __init__(self, class_tokens: int = 1):
        super().__init__()
        self.class_tokens = class_tokens

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B, class tokens + patches, D] -> [B, class tokens + K, D]"""
        index = self.kept.unsqueeze(-1).expand(-1, -1, tokens.shape[-1])
        first, patches = tokens[:, : self.class_tokens], tokens[:, self.class_tokens :]
        return torch.cat([first, patches.gather(1, index)], dim=1)


def feed_patch_dropout(model: nn.Module) -> FedPatchDropout:
    """Put a FedPatchDropout into OpenCLIP's model."""
    if hasattr(model.visual, "trunk"):
        fed = FedPatchDropout(model.visual.trunk.num_prefix_tokens)
        model.visual.trunk.patch_drop = fed
    else:
        fed = model.visual.patch_dropout = FedPatchDropout()
    return fed


def build_model(model_cfg: dict[str, Any]) -> nn.Module:
    """OpenCLIP's model of a model config, in fp32.

    Keys that change a trunk of timm, at which OpenCLIP does not look, are handed to timm.
    """
    arguments = json.loads(json.dumps(model_cfg))
    custom_text = arguments.pop("custom_text", False)
    build = open_clip.CustomTextCLIP if custom_text else open_clip.CLIP
    if "timm_model_name" not in arguments["vision_cfg"]:
        return build(**arguments)
    changed = functools.partial(timm.create_model, **timm_arguments(arguments["vision_cfg"]))
    with mock.patch.object(open_clip.timm_model.timm, "create_model", changed):
        return build(**arguments)


def timm_arguments(vision: dict[str, Any]) -> dict[str, Any]:
    names = {"width": "embed_dim", "layers": "depth", "mlp_ratio": "mlp_ratio"}
    names |= {"patch_size": "patch_size", "image_size": "img_size"}
    given = {theirs: vision[ours] for ours, theirs in names.items() if ours in vision}
    if "head_width" in vision:
        given["num_heads"] = vision["width"] // vision["head_width"]
    if "norm_kwargs" in vision:
        given["norm_layer"] = functools.partial(timm.layers.LayerNorm, **vision["norm_kwargs"])
    if "act_kwargs" in vision:
        tanh = vision["act_kwargs"]["approximate"] == "tanh"
        given["act_layer"] = "gelu_tanh" if tanh else "gelu"
    return given


def random_weights(model_cfg: dict[str, Any], seed: int) -> dict[str, Tensor]:
    """A state dict of OpenCLIP's model.

    Biases, norms and LayerScales are moved off their initial values: a zero bias or a norm of ones
    would hide that it landed in the wrong place. timm's deviation of 0.02 is for widths around a
    thousand: in a narrow trunk blocks would do next to nothing, and training, which then amplifies
    rounding 1,500 times in 20 steps, could not be compared.
    """
    torch.manual_seed(seed)
    model = build_model(model_cfg)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
            elif name.startswith("visual.trunk.") and parameter.ndim == 2:
                parameter.mul_(4)
            elif name == "visual.trunk.cls_token":
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def make_checkpoint(model_cfg: dict[str, Any], seed: int, folder: Path) -> dict[str, Tensor]:
    """Writes an OpenCLIP checkpoint folder with random weights and returns these weights."""
    weights = random_weights(model_cfg, seed)
    size = model_cfg["vision_cfg"]["image_size"]
    folder.mkdir(parents=True)
    save_file(weights, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": model_cfg, "preprocess_cfg": {"size": size, **PREPROCESS}})
    )
    return weights


def make_shards(folder: Path, samples: int, image_size: int, seed: int, shards: int = 2) -> str:
    """Writes captioned PNG pictures as WebDataset shards; returns their brace pattern.

    The pictures are a little larger than `image_size` and not square, so that OpenCLIP's
    evaluation transform has something to resize and crop.
    """
    generator = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for shard, indices in enumerate(np.array_split(np.arange(samples), shards)):
        with tarfile.open(folder / f"{shard:06d}.tar", "w") as tar:
            for index in indices:
                picture, caption = _picture(generator, image_size)
                png = io.BytesIO()
                picture.save(png, format="PNG")
                for extension, content in (("png", png.getvalue()), ("txt", caption.encode())):
                    member = tarfile.TarInfo(f"{index:05d}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return str(folder / f"{{000000..{shards - 1:06d}}}.tar")


def _picture(generator: np.random.Generator, image_size: int) -> tuple[Image.Image, str]:
    """A shape on a smooth noisy ground, and a caption that says what it is."""
    width, height = (int(n) for n in generator.integers(image_size, 2 * image_size, 2))
    ground = Image.fromarray(generator.integers(0, 256, (5, 5, 3), dtype=np.uint8))
    picture = ground.resize((width, height), Image.Resampling.BICUBIC)
    colour, shape, place = (str(generator.choice(words)) for words in (COLOURS, SHAPES, PLACES))
    left, top = generator.random() * width / 2, generator.random() * height / 2
    box = (left, top, left + width / 2, top + height / 2)
    draw = ImageDraw.Draw(picture)
    if shape in ("circle", "ring"):
        draw.ellipse(box, fill=colour if shape == "circle" else None, outline=colour, width=2)
    else:
        draw.rectangle(box, fill=None if shape == "frame" else colour, outline=colour, width=2)
    return picture, f"a {colour} {shape} {place}, {width} by {height}"


def batch_from_shards(folder: Path, checkpoint: Path) -> Batch:
    """All samples of the shards in a folder, by OpenCLIP's evaluation transform and tokenizer."""
    config = json.loads((checkpoint / "open_clip_config.json").read_text())
    transform = image_transform_v2(PreprocessCfg(**config["preprocess_cfg"]), is_train=False)
    context_length = config["model_cfg"]["text_cfg"].get("context_length", 77)
    tokenizer = open_clip.SimpleTokenizer(context_length=context_length)
    images, captions, samples = [], [], []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                content = tar.extractfile(member).read()
                key, extension = member.name.split(".")
                if extension == "png":
                    images.append(transform(Image.open(io.BytesIO(content))))
                    samples.append(Sample(path.name, key))
                else:
                    captions.append(content.decode())
    return Batch(torch.stack(images), tokenizer(captions), samples)


def cosine(lr: float, warmup: int, steps: int) -> Callable[[int], float]:
    """OpenCLIP's cosine schedule: the learning rate of each step, counted from 0."""

    def learning_rate(step: int) -> float:
        if step < warmup:
            return lr * (step + 1) / warmup
        return 0.5 * lr * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))

    return learning_rate


def decayed(name: str, parameter: Tensor) -> bool:
    """Whether OpenCLIP 3.x decays a parameter."""
    kinds = ("bn", "ln", "bias", "logit_scale")
    return parameter.ndim >= 2 and not any(kind in name for kind in kinds)


def lock_towers(model: nn.Module, freeze: dict[str, Any]) -> None:
    """By OpenCLIP's own functions: "all" of a tower, or {"unlocked_groups": N, "norms": bool}."""
    for tower, how in freeze.items():
        if how is None:
            continue
        settings = {"unlocked_groups": 0, "norms": False} | ({} if how == "all" else how)
        if tower == "vision":
            module = model.visual
            model.lock_image_tower(unlocked_groups=settings["unlocked_groups"])
        else:
            module = getattr(model, "text", None) or nn.ModuleList(
                [model.transformer, model.ln_final]
            )
            model.lock_text_tower(unlocked_layers=settings["unlocked_groups"])
        if how == "all":  # OpenCLIP trains the layer that it puts behind a trunk of timm
            module.requires_grad_(False)
        if settings["norms"]:
            for norm in module.modules():
                if isinstance(norm, nn.LayerNorm):
                    norm.requires_grad_(True)


def reference_run(
    model_cfg: dict[str, Any],
    weights: dict[str, Tensor],
    batch: Batch,
    *,
    steps: int,
    learning_rate: Callable[[int], float],
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    clip_grad_norm: float | None = None,
    loss: Literal["infonce", "sigmoid"] | Callable[..., Tensor] = "infonce",
    kept_patches: Callable[[int], Tensor] | None = None,
    precision: Precision = "fp32",
    freeze: dict[str, Any] | None = None,
    unlock_after: int | None = None,
    save: tuple[int, Path] | None = None,
    ema: tuple[float, int] | None = None,
    groups_of: Callable[[nn.Module, float], list[dict[str, Any]]] | None = None,
) -> Reference:
    """Trains OpenCLIP's model on the whole batch at once, `steps` times.

    `loss`: open_clip's, or one of what its model returns. `learning_rate` and `kept_patches` take
    the step counted from 0; the latter gives the patches [B, K] that each sample of the batch
    keeps. `freeze`: as in `lock_towers`, for the first `unlock_after` steps, if given. `save`:
    after so many steps write the file that open_clip_train
    does at the end of an epoch. In "pure_bf16" weights and optimizer are bf16, in "amp_bf16" fp32
    under autocast, as in OpenCLIP's trainer. `ema`: a decay, and after how many steps each the
    average of the weights decays by it. `groups_of`: parameter groups, of the model and
    `weight_decay`, with the learning rate of each in parts of the step's as "lr_scale".
    """
    model = build_model(model_cfg)
    model.load_state_dict(weights)
    lock_towers(model, freeze or {})
    model.train()
    images = batch.images
    if precision == "pure_bf16":
        model.to(torch.bfloat16)
        images = images.to(torch.bfloat16)
    fed = feed_patch_dropout(model) if kept_patches is not None else None
    losses = {"infonce": ClipLoss, "sigmoid": SigLipLoss}
    loss_function = loss if callable(loss) else losses[loss]()

    named = dict(model.named_parameters())
    groups = [
        {"params": [p for n, p in named.items() if not decayed(n, p)], "weight_decay": 0.0},
        {"params": [p for n, p in named.items() if decayed(n, p)], "weight_decay": weight_decay},
    ]
    if groups_of is not None:
        groups = groups_of(model, weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=betas, eps=eps)

    averages = {n: p.detach().clone() for n, p in named.items()} if ema is not None else {}
    records: list[dict[str, float | None]] = []
    for step in range(steps):
        if step == unlock_after:
            model.requires_grad_(True)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step) * group.get("lr_scale", 1.0)
        if fed is not None:
            fed.kept = kept_patches(step)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "amp_bf16"):
            value = loss_function(*model(images, batch.texts))
        value.backward()
        gradients = [p.grad.double() for p in named.values() if p.grad is not None]
        records.append(
            {
                "loss": value.item(),
                "grad_norm": math.sqrt(sum(g.square().sum().item() for g in gradients)),
                "logit_scale": model.logit_scale.exp().item(),
                "logit_bias": None if model.logit_bias is None else model.logit_bias.item(),
                "lr": learning_rate(step),
            }
        )
        if clip_grad_norm is not None:
            nn.utils.clip_grad_norm_(named.values(), clip_grad_norm)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
            if ema is not None and (step + 1) % ema[1] == 0:
                for name, parameter in named.items():
                    averages[name] = ema[0] * averages[name] + (1 - ema[0]) * parameter
        if save is not None and step + 1 == save[0]:
            state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
            content = {"epoch": 1, "name": "run", "state_dict": state}
            torch.save(content | {"optimizer": optimizer.state_dict()}, save[1])
    weights = {n: v.detach().float() for n, v in model.state_dict().items()}
    return Reference(records, weights, averages)


def load_weights(folder: Path) -> dict[str, Tensor]:
    """The weights of an OpenCLIP checkpoint folder, in fp32."""
    return {n: v.float() for n, v in load_file(folder / "open_clip_model.safetensors").items()}
