"""`meta.json`: what a checkpoint holds beside its tensors."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from parallel_clip.checkpoint import durable
from parallel_clip.checkpoint.durable import FileRecord
from parallel_clip.checkpoint.manifest import Manifest
from parallel_clip.errors import InputError
from parallel_clip.model.architecture import Architecture

META_FILE = "meta.json"
FORMAT = 2


@dataclass(frozen=True)
class Meta:
    """The model of a checkpoint and how far its run has come.

    step: optimizer steps done; position: samples of the global order consumed; bad_samples:
    replaced so far; source_samples: pairs seen of each source; data: identifies the training
    samples and their order, see `RunShards.fingerprint`, beside `shards`, where each source was
    said to be; model and preprocess: OpenCLIP's
    model_cfg and preprocess_cfg; tokenizer: as in `data.tokenizer`, a path made absolute;
    run_model: the model that `phases` change, None where it is `model`; has_averages: whether it
    has those of the weights (`ema.decay`); updates: of the optimizer, which are fewer than the
    steps where bad ones were skipped; frozen: names of the parameters that are not trained and have
    no moments; trained_since: after how many updates others began to be, where not at once;
    measures_bias: whether `logit_bias` is still to be measured, on the batch of the next step;
    grad_norms and skipped: what `bad_steps` remembers of the last steps; config: of the run, all
    keys; layout and versions: those that wrote the checkpoint.
    """

    step: int
    position: int
    bad_samples: int
    model_name: str
    model: dict[str, Any]
    preprocess: dict[str, Any]
    tokenizer: str | None = None
    run_model: dict[str, Any] | None = None
    source_samples: tuple[int, ...] = ()
    data: dict[str, Any] | None = None
    has_moments: bool = True
    has_averages: bool = False
    updates: int = 0
    frozen: tuple[str, ...] = ()
    trained_since: dict[str, int] = field(default_factory=dict)
    measures_bias: bool = False
    grad_norms: tuple[float, ...] = ()
    skipped: tuple[int, ...] = ()
    config: dict[str, Any] | None = None
    layout: dict[str, Any] | None = None
    versions: dict[str, str | None] | None = None
    format: int = FORMAT

    @classmethod
    def of_model(
        cls, architecture: Architecture, preprocess: dict[str, Any], tokenizer: str | None
    ) -> Meta:
        """The model's fields filled in, at step 0; the others are set by `dataclasses.replace`."""
        return cls(
            step=0,
            position=0,
            bad_samples=0,
            model_name=architecture.name,
            model=architecture.json,
            preprocess=preprocess,
            tokenizer=tokenizer,
        )

    def updates_of(self, name: str) -> int:
        """How often Adam has updated a parameter."""
        return self.updates - self.trained_since.get(name, 0)

    def trained_since_with(self, frozen: Collection[str]) -> dict[str, int]:
        """`trained_since` of a run that goes on from here with `frozen` frozen."""
        since = self.trained_since | dict.fromkeys(self.frozen, self.updates)
        return {name: updates for name, updates in since.items() if updates and name not in frozen}

    def write(self, folder: Path) -> FileRecord:
        return durable.write_new(folder / META_FILE, [json.dumps(asdict(self), indent=1).encode()])

    @classmethod
    def read(cls, folder: Path) -> Meta:
        """Raises InputError where the folder holds no checkpoint of this format, or a damaged one
        (its manifest and this file are verified)."""
        Manifest.read(folder).verify(folder, [META_FILE])
        try:
            values = json.loads((folder / META_FILE).read_text())
            if values["format"] != FORMAT:
                raise InputError(
                    f"{folder} has checkpoint format {values['format']}; this version reads "
                    f"{FORMAT}; use the version of parallel_clip that wrote it"
                )
            return cls(**values)
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(f"{folder} is not a checkpoint: {META_FILE}: {error}") from None
