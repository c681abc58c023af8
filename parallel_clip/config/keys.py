"""Every key of a training config: its type, its default, and what it means in one line.

`load_config` reads YAML and overrides into a checked, frozen `Config`. What needs the number of
processes to be checked is in `layout.py`.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from parallel_clip.config import file as config_file
from parallel_clip.errors import InputError

Shards = str | list[str]
Beta = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
LayerDecay = Annotated[float, Field(gt=0, le=1)]
Side = Annotated[int, Field(ge=1)]
Duplicates = Literal["none", "tokens"] | Annotated[str, Field(pattern="^key:.", title="key:NAME")]
Until = str | Annotated[int, Field(ge=1)]
ImageSize = Side | Annotated[list[Side], Field(min_length=2, max_length=2)]
CaptionKey = str | Annotated[dict[str, Positive], Field(min_length=1)]


class ConfigSection(BaseModel):
    """A group of keys; nothing unknown is taken, nothing converted, nothing changed later."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, populate_by_name=True, allow_inf_nan=False
    )


class Model(ConfigSection):
    name: str | None = Field(
        None,
        description="OpenCLIP model name, or path of a JSON file in its model-config format; null: "
        "the model of init.from, else ViT-L-14",
    )
    override: list[str] = Field(
        [],
        description="switches in which name may differ from what init.from says, e.g. [quick_gelu]",
    )
    image_size: ImageSize | None = Field(
        None,
        description="pixels of both sides, or [height, width], in place of those of the model; "
        "positions of init.* are interpolated",
    )
    context_length: int | None = Field(
        None,
        ge=1,
        description="tokens of a text, in place of those of the model; positions of init.* are "
        "interpolated",
    )


class Init(ConfigSection):
    from_: str | None = Field(
        None,
        alias="from",
        description="run or checkpoint of any kind whose weights to start from; null: random",
    )
    vision: str | None = Field(
        None,
        description="likewise, of which the image tower alone is taken; null: that of init.from",
    )
    text: str | None = Field(
        None,
        description="likewise, of which the text tower alone is taken; null: that of init.from",
    )
    projection: Literal["keep", "new"] = Field(
        "keep",
        description="projections of init.*'s towers to features; new: random, where theirs do not "
        "fit the model, or all where all fit",
    )
    logit_scale: float | None = Field(
        None,
        ge=1,
        le=100,
        description="multiplier of the logits that the run begins with; null: that of init.from, "
        "else of the model's JSON",
    )
    logit_bias: Literal["measured"] | float | None = Field(
        None,
        description="bias of the logits that the run begins with (sigmoid); measured: that with "
        "the smallest loss on the first batch; null: that of init.from, or measured where this has "
        "none, else of the model's JSON",
    )


class Loss(ConfigSection):
    kind: Literal["infonce", "sigmoid"] = Field(
        "infonce", description="softmax over the global batch, or one sigmoid a pair"
    )
    duplicates: Duplicates = Field(
        "none",
        description="pairs that are not each other's negatives: tokens, those with the same "
        "caption; key:NAME, with the same value at that key of their `.json`",
    )
    label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="part of each target that is spread evenly over its row or column (infonce)",
    )
    exchange: Literal["auto", "gather", "ring"] = Field(
        "auto",
        description="texts of all ranks held at once, or streamed in chunks; auto: by their size",
    )
    stages: Literal["auto", "last", "all"] = Field(
        "auto",
        description="pipeline stages that work on the loss; auto: all where they would wait for it "
        "and the batch is large",
    )
    tile: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        "auto",
        description="columns of logits worked on at a time, computed again for the gradient; "
        "auto: by size, and kept where they are small",
    )


class Stages(ConfigSection):
    vision: list[Count] = Field(description="vision layers on each stage, in order")
    text: list[Count] = Field(description="text layers on each stage, in order")


class Parallel(ConfigSection):
    tensor: int = Field(1, ge=1, description="ranks that share every layer's heads and MLP")
    pad: bool = Field(
        False,
        description="let `tensor` be any size: where it does not divide heads or MLP channels, pad "
        "them with zeros; the run says what that wastes",
    )
    pipeline: int = Field(1, ge=1, description="stages that the layers are dealt to")
    virtual_pipeline: int = Field(
        1, ge=1, description="chunks of layers a stage holds (interleaved pipelining)"
    )
    stages: Stages | None = Field(
        None,
        description="layers on each stage, by hand: {vision: [9, 8, 7], text: [4, 4, 4]}; null: "
        "balanced by cost",
    )
    sequence: bool = Field(
        False, description="split activations between the tensor ranks along the sequence as well"
    )
    schedule: Literal["auto", "two-pass", "stash"] = Field(
        "auto", description="how microbatches run: forward twice, or once keeping every graph"
    )
    stash: Count | Literal["auto"] = Field(
        "auto",
        description="microbatches of a step whose activations are kept from the first pass, so "
        "that they run forward once; auto: as many as `parallel.memory` has room for",
    )
    memory: str | Annotated[int, Field(ge=1)] | None = Field(
        None,
        description="memory that a rank may fill, such as 70GB: what `plan.check` compares with "
        "and `stash: auto` fills; null: what is free on the GPU of rank 0, of which stash fills "
        "nine tenths, or a rank's share of this machine's memory or of its cgroup's limit on a "
        "CPU, which stash leaves alone",
    )
    distributed_optimizer: bool = Field(
        True, description="split optimizer state between the data-parallel ranks (ZeRO-1)"
    )


class Batch(ConfigSection):
    global_: int = Field(
        32768, alias="global", ge=1, description="pairs in one optimizer step, over all ranks"
    )
    micro: int = Field(
        256, ge=1, description="pairs that one data-parallel rank runs through the model at once"
    )


class Train(ConfigSection):
    steps: int | None = Field(None, ge=1, description="length of the run in optimizer steps")
    samples: int | None = Field(None, ge=1, description="length of the run in pairs")
    epochs: float | None = Field(None, gt=0, description="length of the run in passes")
    time_limit: str | Annotated[float, Field(gt=0, strict=False)] | None = Field(
        None,
        description="time after which a process saves and ends by itself, such as 23h30m, or "
        "seconds; counted from its start, the time of a save included",
    )


class Optimizer(ConfigSection):
    lr: float = Field(5e-4, ge=0, description="highest learning rate")
    lr_vision: float | None = Field(
        None, ge=0, description="that of the image tower; null: `optimizer.lr`"
    )
    lr_text: float | None = Field(
        None, ge=0, description="that of the text tower; null: `optimizer.lr`"
    )
    lr_logit: float | None = Field(
        None, ge=0, description="that of `logit_scale` and `logit_bias`; null: `optimizer.lr`"
    )
    layer_decay: LayerDecay | dict[Literal["vision", "text"], LayerDecay | None] | None = Field(
        None,
        description="learning rate of a layer, in parts of that of the layer after it; a number, "
        "or {vision: 0.75, text: null}; null: 1",
    )
    betas: tuple[Beta, Beta] = Field(
        (0.9, 0.98), strict=False, description="decay of the first and of the second moment"
    )
    eps: float = Field(1e-6, gt=0, description="added to the root of the second moment")
    weight_decay: float = Field(
        0.2, ge=0, description="on weights of two or more dimensions, norms' apart"
    )
    no_decay: Literal["openclip3", "openclip4"] | list[str] = Field(
        "openclip3",
        description="weights of two or more dimensions that do not decay; openclip3: norms'; "
        "openclip4: position and class embeddings as well; or patterns of OpenCLIP's names, beside "
        "norms: ['*positional_embedding']",
    )
    clip_grad_norm: float | None = Field(
        None, gt=0, description="largest L2 norm of the whole gradient; null: unclipped"
    )


class LearningRateSchedule(ConfigSection):
    kind: Literal["cosine", "constant", "wsd"] = Field(
        "cosine",
        description="learning rate after the warmup; wsd: constant, then linear to `min_lr`",
    )
    warmup: int = Field(2000, ge=0, description="steps of linear rise from zero")
    cooldown: int = Field(0, ge=0, description="steps of the final fall (wsd)")
    min_lr: float = Field(0.0, ge=0, description="learning rate at the end (cosine, wsd)")


class Ema(ConfigSection):
    decay: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="keep an exponential moving average of the weights: decay × average + "
        "(1 - decay) × weight, fp32; null: none",
    )
    every: int = Field(1, ge=1, description="updates of the weights between those of the average")


class DataSource(ConfigSection):
    shards: Shards = Field(description="WebDataset shards: a brace pattern, or several")
    samples: int | None = Field(None, ge=1, description="use only the first so many; null: all")
    weight: float = Field(1.0, gt=0, description="how often an epoch shows each sample")
    caption_key: CaptionKey | None = Field(
        None, description="of this source; null: `data.caption_key`"
    )
    caption_lines: bool | None = Field(
        None, description="of this source; null: `data.caption_lines`"
    )


class Data(ConfigSection):
    train: list[DataSource] = Field(
        [], description="sources of training pairs, at least one, unless each phase has some"
    )
    caption_key: CaptionKey | None = Field(
        None,
        description="key of the sample's `.json` that holds the caption, or several with the "
        "probability of each, {caption: 0.7, alt: 0.3}; null: its `.txt`",
    )
    caption_lines: bool = Field(
        False,
        description="each line of a `.txt` is a caption, of which training draws one; false: the "
        "whole text is the caption",
    )
    captions_per_image: int = Field(
        1,
        ge=1,
        description="captions that a picture is trained with at once, all of them positives; where "
        "it has fewer they are repeated; `batch` goes on counting pictures",
    )
    empty_caption: Literal["bad", "keep"] = Field(
        "bad",
        description="a training pair without caption is a bad sample; keep: trained with an empty "
        "text, as OpenCLIP does",
    )
    max_pixels: int = Field(
        178_956_970,
        ge=1,
        description="width x height above which a picture is a bad sample; Pillow's own limit",
    )
    augment: Literal["train", "none"] = Field(
        "train", description="random resized crop; none: evaluation transform, first caption"
    )
    augment_options: dict[str, Any] = Field(
        {}, description="OpenCLIP's aug_cfg: scale, ratio, color_jitter, gray_scale..."
    )
    mean: tuple[float, float, float] | None = Field(
        None, strict=False, description="mean of each colour; null: of `init.*`, else OpenAI's"
    )
    std: tuple[Positive, Positive, Positive] | None = Field(
        None, strict=False, description="deviation of each; null: of `init.*`, else OpenAI's"
    )
    interpolation: Literal["bicubic", "bilinear"] | None = Field(
        None, description="how pictures are resized; null: of `init.*`, else bicubic"
    )
    resize_mode: Literal["shortest", "longest", "squash"] | None = Field(
        None, description="side to fit in evaluation; null: of `init.*`, else shortest"
    )
    tokenizer: str | None = Field(
        None,
        description="openclip, or a folder or SentencePiece model; null: of the model or beside "
        "`init.*`",
    )
    workers: int = Field(4, ge=0, description="processes that read and decode, a rank")
    prefetch: int = Field(2, ge=1, description="batches that each worker keeps ready")
    worker_patience: float = Field(
        25.0, gt=0, description="seconds that a worker may take over one sample before it is stuck"
    )
    decode: Literal["exact", "fast"] = Field(
        "exact",
        description="fast: large JPEGs are decoded at 1/2, 1/4 or 1/8 of their size where the "
        "crop does not need more; pixels differ a little from OpenCLIP's",
    )
    normalize: Literal["device", "worker"] = Field(
        "device",
        description="where pictures become numbers of mean 0; device: they travel as bytes, a "
        "fourth as many; the same bits",
    )
    missing: Literal["error", "skip"] = Field(
        "error", description="skip: train without shards that are missing, cut or not readable"
    )
    max_missing_fraction: float = Field(
        0.01, ge=0, le=1, description="of a source's shards, that `missing: skip` may leave out"
    )
    exclude: list[str] = Field(
        [], description="shards to leave out: names or paths, with wildcards or braces"
    )
    cache: str | Annotated[int, Field(ge=1)] = Field(
        "32GB", description="most that is kept of shards at addresses, on each machine"
    )
    storage_options: dict[str, Any] = Field(
        {},
        description="fsspec's options for addresses: {anon: true, endpoint_url: ...}, or by kind, "
        "{s3: {...}, https: {...}}",
    )
    retries: int = Field(5, ge=0, description="how often a request to a store is tried again")
    timeout: float = Field(
        30.0, gt=0, description="seconds without a byte after which a request has failed"
    )
    max_bad_fraction: float = Field(
        0.01, ge=0, le=1, description="end the run when more of the samples are found to be bad"
    )


class Checkpoint(ConfigSection):
    every: int = Field(1000, ge=0, description="steps between checkpoints; 0: only at the end")
    keep: int | None = Field(3, ge=1, description="how many of the newest to keep; null: all")
    async_: bool = Field(
        False,
        alias="async",
        description="write while training goes on, from a copy in host memory",
    )
    verify: bool = Field(
        True, description="hash every file of a checkpoint before a run starts or resumes from it"
    )
    fallback: bool = Field(
        False, description="resume from the checkpoint before where the newest is damaged"
    )
    failures: int = Field(0, ge=0, description="failed writes in a row that training goes on over")


class PartlyFrozen(ConfigSection):
    unlocked_groups: int = Field(
        0,
        ge=0,
        description="groups that are trained, counted from the projection as OpenCLIP does: the "
        "projection, the last block with its norm, and so on to the embedding",
    )
    norms: bool = Field(False, description="train the LayerNorms of the frozen groups as well")
    unfreeze_at: Until | None = Field(
        None,
        description="share of the run's steps, such as 10%, or number of pairs, after which all of "
        "the tower is trained; null: never",
    )


class Freeze(ConfigSection):
    vision: Literal["all"] | PartlyFrozen | None = Field(
        None,
        description="what of the image tower is not trained: all, or all groups but the last few "
        "(OpenCLIP's --lock-image, --lock-image-unlocked-groups)",
    )
    text: Literal["all"] | PartlyFrozen | None = Field(
        None, description="likewise of the text tower (--lock-text, --lock-text-unlocked-layers)"
    )


class Phase(ConfigSection):
    until: Until | None = Field(
        None,
        description="end of the phase: share of the run's steps, such as 90%, or number of pairs, "
        "both from the run's beginning; of all but the last phase",
    )
    resolution: ImageSize | None = Field(
        None,
        description="pixels of both sides, or [height, width]; positions are interpolated where it "
        "changes; null: that of the model",
    )
    patch_dropout: float | None = Field(
        None, ge=0, lt=1, description="share of patches left out; null: that of the model"
    )
    lr: float | None = Field(
        None, ge=0, description="in place of `optimizer.lr`; null: `optimizer.lr`"
    )
    sources: list[DataSource] | None = Field(
        None,
        description="what the phase trains on; sources and weights of an earlier phase go on where "
        "it stopped; null: `data.train`",
    )


class Watchdog(ConfigSection):
    timeout: float = Field(
        1800.0,
        gt=0,
        strict=False,
        description="seconds without progress until the stalled rank is named and the job ends",
    )


class BadSteps(ConfigSection):
    action: Literal["halt", "skip"] = Field(
        "halt",
        description="on a step whose loss or gradient is not finite: end the run, or leave it out",
    )
    limit: int = Field(3, ge=0, description="bad steps that skip allows within `window` steps")
    window: int = Field(100, ge=1, description="steps over which bad ones and norms are counted")
    spike: float | None = Field(
        None,
        gt=1,
        strict=False,
        description="a grad_norm of so many times the median of the last `window` good steps is "
        "bad, too; null: none is",
    )


class Resume(ConfigSection):
    allow: list[str] = Field(
        [], description="keys whose change is accepted and recorded, e.g. [optimizer.lr]"
    )


class ZeroShot(ConfigSection):
    shards: Shards = Field(description="pictures with the number of their class as `.cls`")
    classes: str = Field(description="file with one class name a line; line 0 is class 0")
    templates: str | None = Field(
        None, description="file with one prompt a line and {} in it, or openai; null: a short list"
    )


class Evaluate(ConfigSection):
    every: int = Field(0, ge=0, description="steps between evaluations; 0: never")
    loss: Shards | None = Field(None, description="held-out shards for the loss")
    retrieval: Shards | None = Field(None, description="held-out shards for recall")
    zero_shot: ZeroShot | None = Field(None, description="held-out shards for classification")
    ema: bool = Field(False, description="evaluate the averages of `ema.decay`, not the weights")
    batch: int = Field(64, ge=1, description="pictures or texts that one rank encodes at once")
    workers: int | None = Field(
        None,
        ge=0,
        description="processes that read and decode, a rank; null: as many as data.workers; 0: the "
        "rank's own",
    )


class Plan(ConfigSection):
    check: Literal["error", "warn", "off"] = Field(
        "error",
        description="what to do at the start where more memory is predicted than a rank has: end "
        "with layouts that fit, or say so and go on; off: predict nothing",
    )
    device: str | None = Field(
        None,
        description="device file, or one of a100, h100, h200, b200, that the time of a step is "
        "predicted from; null: that of the GPU, where its name is one of these",
    )

    @field_validator("check", mode="before")
    @classmethod
    def _off_is_no_boolean(cls, value: Any) -> Any:
        return "off" if value is False else value  # which it is in YAML 1.1


class Log(ConfigSection):
    every: int = Field(10, ge=1, description="steps between lines of the log")
    ledger: bool = Field(False, description="write which samples each step has seen")


class Config(ConfigSection):
    model: Model = Model()
    init: Init = Init()
    loss: Loss = Loss()
    parallel: Parallel = Parallel()
    batch: Batch = Batch()
    precision: Literal["fp32", "bf16"] = Field(
        "bf16", description="of weights and activations in the towers; masters are fp32"
    )
    recompute: Literal["none", "selective", "full"] = Field(
        "none",
        description="what the backward computes again; selective: norms and activation functions; "
        "full: whole layers",
    )
    train: Train = Train()
    optimizer: Optimizer = Optimizer()
    schedule: LearningRateSchedule = LearningRateSchedule()
    ema: Ema = Ema()
    data: Data = Data()
    freeze: Freeze = Freeze()
    phases: list[Phase] = Field(
        [], description="parts of the run that differ in the keys below, in order; []: one"
    )
    checkpoint: Checkpoint = Checkpoint()
    watchdog: Watchdog = Watchdog()
    bad_steps: BadSteps = BadSteps()
    resume: Resume = Resume()
    evaluate: Evaluate = Evaluate()
    plan: Plan = Plan()
    log: Log = Log()
    deterministic: bool = Field(
        False, description="the same bits on every run, on GPU too (slower); CPU runs always are"
    )
    seed: int = Field(0, ge=0, description="of weights, data order, augmentation, patch dropout")
    run_dir: str = Field("runs/demo", description="folder of the run; a run in it is resumed")

    def to_tree(self) -> dict[str, Any]:
        """All keys by their YAML names, defaults filled in."""
        return self.model_dump(mode="json", by_alias=True)

    def to_record(self) -> dict[str, Any]:
        """`to_tree` for files that others may read: without what `data.storage_options` has of
        credentials."""
        tree = self.to_tree()
        tree["data"]["storage_options"] = _without_secrets(self.data.storage_options)
        return tree

    def to_yaml(self) -> str:
        """All keys, defaults filled in; `load_config` gives the same `Config` back, but for
        credentials."""
        return config_file.write_yaml(self.to_record())


_SECRET = re.compile(r"key|secret|token|passw|credential|connection_string|authorization", re.I)


def _without_secrets(options: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _without_secrets(value)
        if isinstance(value, dict)
        else "(not kept)"
        if _SECRET.search(name) and isinstance(value, str)
        else value
        for name, value in options.items()
    }


_UNITS = {"": 1, "MB": 10**6, "GB": 10**9, "TB": 10**12, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def parse_bytes(size: str | int, key: str = "parallel.memory") -> int:
    """80GB is 80 × 10⁹ bytes, 80GiB is 80 × 2³⁰, 80 is 80; `key` is where the user wrote it.

    Raises:
        InputError: `size` is none of these.
    """
    parts = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([A-Za-z]*)", str(size).strip())
    number, unit = parts.groups() if parts else ("", "")
    whole = int(float(number or 0) * _UNITS.get(unit, 0))
    if whole < 1:
        raise InputError(
            f"{key} {size} is no size of a memory; write a number and one of "
            f"{', '.join(filter(None, _UNITS))}, such as 80GB, or bytes"
        )
    return whole


_TIME = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m(?:in)?)?(?:(\d+(?:\.\d+)?)s)?")


def parse_seconds(time: str | float, key: str) -> float:
    """23h30m is 84,600 seconds, 1d2h 93,600, 90 is 90; `key` is where the user wrote it.

    Raises:
        InputError: `time` is none of these.
    """
    if not isinstance(time, str):
        return float(time)
    parts = _TIME.fullmatch(time.strip().replace(" ", ""))
    found = [float(part or 0) for part in parts.groups()] if parts else [0.0]
    seconds = sum(n * unit for n, unit in zip(found, (86400, 3600, 60, 1), strict=False))
    if seconds <= 0:
        raise InputError(f"{key} {time!r} is no time; write such as 23h30m, 90m, 1d12h, or seconds")
    return seconds
