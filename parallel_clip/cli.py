"""The commands: parse, call, print."""

from __future__ import annotations

import argparse
import errno
import io
import os
import sys
import traceback
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

import yaml

from parallel_clip import __version__, commands
from parallel_clip.engine.error_report import is_lost_connection, report_error_once
from parallel_clip.engine.launch import Launch, read_launch
from parallel_clip.engine.quiet import silence_dependency_warnings
from parallel_clip.errors import BadDataError, InputError, SaveFailedError, WorkerError

# Of a disk or a mount, not of our code.
_DISK_ERRORS = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ENOENT, errno.ESTALE,
    errno.ENOTCONN,
)  # fmt: skip

_ALONE = (commands.data_index, commands.data_check, commands.data_pack)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Exit codes: 0 done, 2 the input is wrong, 1 something broke."""
    launch = Launch(0, 0, 1)
    silence_dependency_warnings()
    try:
        launch = read_launch()
        if isinstance(sys.stdout, io.TextIOWrapper):  # names of files may be any bytes
            sys.stdout.reconfigure(errors="backslashreplace")
        options = _parse(arguments)
        if options.run in _ALONE:  # as one of several tasks, each with a part of the work
            launch = Launch(0, 0, 1)
        return options.run(options, launch) or 0
    except InputError as error:
        report_error_once(f"parallel-clip: {error}", launch)
        return 2
    except (BadDataError, FloatingPointError, SaveFailedError) as error:
        report_error_once(f"parallel-clip: {error}", launch)
        return 1
    except KeyboardInterrupt:
        print("parallel-clip: interrupted", file=sys.stderr)
        return 130
    except WorkerError as error:
        _end_at_once(str(error), launch)
    except Exception as error:
        from parallel_clip.data.feeding.workers import worker_failure

        failure = worker_failure(error)
        if failure is not None:
            _end_at_once(failure, launch)
        if is_lost_connection(error):
            print(
                f"parallel-clip: rank {launch.rank} stops: the connection to another rank was "
                "closed; the rank that failed says why",
                file=sys.stderr,
            )
        elif isinstance(error, OSError) and error.errno in _DISK_ERRORS:
            where = f" (rank {launch.rank})" if launch.world_size > 1 else ""
            print(
                f"parallel-clip: a file cannot be used{where}: {error.strerror}"
                f"{f': {error.filename}' if error.filename else ''}; see to the disk, then the "
                "same command goes on with what it had kept (a run from its last checkpoint)",
                file=sys.stderr,
            )
        else:
            print(f"parallel-clip: rank {launch.rank} failed:", file=sys.stderr)
            traceback.print_exc()
        sys.stderr.flush()
        return 1


def _end_at_once(message: str, launch: Launch) -> NoReturn:
    """Say what happened to this rank's workers, and end without waiting for them: one that is stuck
    in the file system does not even hear SIGKILL."""
    where = f" (rank {launch.rank})" if launch.world_size > 1 else ""
    print(f"parallel-clip: {message}{where}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong as every other wrong input is said: once, by rank 0."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see {self.prog} --help")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse takes no more positional arguments after an option: `train CONFIG --dry-run a=b`.
    if hasattr(options, "overrides") and not any(word.startswith("-") for word in rest):
        options.overrides += rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return options


def _parser() -> _Parser:
    parser = _Parser(
        prog="parallel-clip",
        description="Train CLIP models that do not fit on one GPU, from OpenCLIP names, data and "
        "checkpoints. Start several processes with torchrun or srun: "
        "torchrun --nproc-per-node 8 -m parallel_clip train CONFIG.",
    )
    parser.add_argument("--version", action="version", version=f"parallel_clip {__version__}")
    commands_ = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_train(commands_)
    _add_evaluate(commands_)
    _add_convert(commands_)
    _add_checkpoint(commands_)
    _add_data(commands_)
    _add_plan(commands_)
    doctor = commands_.add_parser("doctor", help="what is installed here and what of it is used")
    doctor.set_defaults(run=commands.doctor)
    return parser


_CHECKPOINT_HELP = (
    "a run folder, one of its checkpoints, or a file or folder of OpenCLIP's or Hugging Face's"
)


def _add_train(parent) -> None:
    parser = parent.add_parser(
        "train",
        help="train a model, or go on with a run",
        description="Train the model that CONFIG describes. In a folder that holds a run of the "
        "same config it goes on where the run stopped. docs/configuration.md lists the keys.",
    )
    parser.add_argument("config", metavar="CONFIG", help="YAML file")
    parser.add_argument(
        "overrides", metavar="key=value", nargs="*", help="config keys, e.g. parallel.tensor=2"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, print the layout and its memory"
    )
    parser.add_argument(
        "--world-size", type=_positive, metavar="N", help="with --dry-run: as if on N processes"
    )
    parser.set_defaults(run=commands.train)


def _add_evaluate(parent) -> None:
    parser = parent.add_parser(
        "evaluate", help="zero-shot classification, or retrieval, on held-out shards"
    )
    kinds = parser.add_subparsers(required=True, metavar="KIND")
    zero_shot = kinds.add_parser(
        "zero-shot", help="top-1 and top-5 accuracy from class names alone"
    )
    zero_shot.add_argument(
        "--classes", required=True, metavar="FILE", help="one class name a line; line 0 is class 0"
    )
    zero_shot.add_argument(
        "--templates",
        metavar="FILE",
        help="one prompt a line with {} in it, or `openai` for CLIP's 80; default: a short list",
    )
    retrieval = kinds.add_parser("retrieval", help="recall@1, 5 and 10 in both directions")
    for kind, run in ((zero_shot, commands.zero_shot), (retrieval, commands.retrieval)):
        kind.add_argument("checkpoint", metavar="CHECKPOINT", help=_CHECKPOINT_HELP)
        kind.add_argument("--data", required=True, metavar="SHARDS", help="held-out shards")
        kind.add_argument("--json", metavar="FILE", help="write the figures; - prints them alone")
        _add_model(kind)
        kind.add_argument("--tokenizer", metavar="T", help="as data.tokenizer of a config")
        _add_samples(kind)
        kind.add_argument("--batch", type=_positive, default=64, help="encoded at once (64)")
        kind.add_argument("--workers", type=_count, default=4, help="processes that decode (4)")
        kind.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
        kind.add_argument("--ema", action="store_true", help="the averages of the weights")
        kind.add_argument(
            "--tensor", type=_positive, default=1, metavar="T", help="ranks that share the model"
        )
        kind.set_defaults(run=run)


def _add_convert(parent) -> None:
    parser = parent.add_parser("convert", help="between runs, OpenCLIP and Hugging Face")
    parser.add_argument("source", metavar="SOURCE", help=_CHECKPOINT_HELP)
    parser.add_argument("target", metavar="TARGET", help="a new or empty folder")
    parser.add_argument("--to", required=True, choices=["openclip", "huggingface", "run"])
    parser.add_argument(
        "--precision", choices=["fp32", "bf16", "fp16"], default="fp32", help="default: fp32"
    )
    parser.add_argument(
        "--bin",
        action="store_true",
        help="with --to openclip: also write open_clip_pytorch_model.bin",
    )
    parser.add_argument(
        "--license",
        metavar="ID",
        help="licence of the weights for the model card, such as apache-2.0 (default: none named)",
    )
    _add_model(parser)
    parser.add_argument(
        "--ema", action="store_true", help="the averages of the weights (ema.decay of the run)"
    )
    parser.add_argument(
        "--mix",
        nargs=2,
        action="append",
        default=[],
        metavar=("CHECKPOINT", "SHARE"),
        help="the weighted mean with this checkpoint of the same model, which has this share of "
        "it, such as 0.5 or 1/3, and SOURCE what is left; may be given several times",
    )
    parser.add_argument(
        "--with-optimizer",
        action="store_true",
        help="with --to run: go on where open_clip_train stopped (epoch_N.pt)",
    )
    parser.add_argument(
        "--global-batch", type=_positive, metavar="N", help="pairs in a batch of that run"
    )
    parser.set_defaults(run=commands.convert)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="model name or JSON file (default: what the checkpoint says)",
    )
    parser.add_argument(
        "--override",
        metavar="KEYS",
        type=lambda text: text.split(","),
        default=[],
        help="where --model differs from what the checkpoint says, and means it: quick_gelu,...",
    )


def _add_checkpoint(parent) -> None:
    parser = parent.add_parser("checkpoint", help="list, verify or show a run's checkpoints")
    kinds = parser.add_subparsers(required=True, metavar="KIND")
    for name, run, words in (
        ("list", commands.checkpoint_list, "steps, sizes, layouts that wrote them, age"),
        ("verify", commands.checkpoint_verify, "hash every file; exit 2 if one is damaged"),
        ("show", commands.checkpoint_show, "what the newest says of itself"),
    ):
        kind = kinds.add_parser(name, help=words)
        kind.add_argument("run_folder", metavar="RUN", help="a run folder, or one checkpoint of it")
        kind.add_argument("--json", metavar="FILE", help="write the figures; - prints them alone")
        kind.set_defaults(run=run)


def _add_data(parent) -> None:
    parser = parent.add_parser("data", help="index, check or make WebDataset shards")
    kinds = parser.add_subparsers(required=True, metavar="KIND")
    index = kinds.add_parser("index", help="write where each sample of each shard lies")
    index.add_argument("shards", nargs="+", metavar="SHARDS", help='e.g. "data/{0000..0099}.tar"')
    index.add_argument(
        "--workers", type=_positive, metavar="N", help="processes (default: one a core)"
    )
    index.add_argument(
        "--part",
        type=_part,
        metavar="K/N",
        help="only the K-th of N parts, as one of N machines; then --merge on one",
    )
    index.add_argument(
        "--merge", action="store_true", help="make the index of all parts, scan none"
    )
    index.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="where the index goes (default: beside the shards)",
    )
    _add_storage(index)
    index.set_defaults(run=commands.data_index)
    check = kinds.add_parser("check", help="read and decode everything; exit 2 if any is broken")
    check.add_argument("shards", nargs="+", metavar="SHARDS")
    _add_samples(check)
    check.add_argument("--workers", type=_positive, default=1, metavar="N", help="processes (1)")
    check.add_argument("--json", metavar="FILE", help="write the report; - prints it alone")
    check.set_defaults(run=commands.data_check)
    pack = kinds.add_parser("pack", help="make shards of a folder of pictures, or of a CSV")
    pack.add_argument("source", metavar="SOURCE", help="folder with .txt captions, or a CSV")
    pack.add_argument("target", metavar="TARGET", help="a new or empty folder")
    pack.add_argument("--samples-per-shard", type=_positive, default=10_000, metavar="N")
    pack.set_defaults(run=commands.data_pack)


def _add_samples(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--caption-key", metavar="KEY", help="key of the .json, as data.caption_key"
    )
    parser.add_argument(
        "--max-pixels",
        type=_positive,
        default=178_956_970,
        metavar="N",
        help="largest width x height of a picture, as data.max_pixels (178956970)",
    )
    _add_storage(parser)


def _add_storage(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cache", default="32GB", metavar="SIZE", help="as data.cache, of shards at addresses"
    )
    parser.add_argument(
        "--storage-options",
        type=_mapping,
        default={},
        metavar="YAML",
        help='as data.storage_options: "{anon: true}"',
    )


def _add_plan(parent) -> None:
    parser = parent.add_parser(
        "plan",
        help="find the layouts that train a model best on a number of GPUs",
        description="Rank the layouts of CONFIG's model that fit, by predicted step time. Opens no "
        "shard and needs no GPU. docs/planning.md has examples.",
    )
    parser.add_argument("config", metavar="CONFIG", nargs="?", help="YAML file")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="config keys")
    parser.add_argument("--gpus", type=_positive, metavar="N", help="in all")
    parser.add_argument("--gpu-memory", metavar="80GB", help="that a GPU may fill")
    parser.add_argument(
        "--gpu", default="h100", metavar="NAME", help="a100, h100, h200, b200 or a file (h100)"
    )
    parser.add_argument(
        "--nodes-of", type=_positive, default=8, metavar="N", help="GPUs in a node (8)"
    )
    parser.add_argument(
        "--layout",
        metavar="tensor=2,pipeline=4",
        help="this one alone; also virtual_pipeline, micro, recompute, schedule, stash",
    )
    parser.add_argument(
        "--max-batch", action="store_true", help="for the largest batch.global that fits"
    )
    parser.add_argument(
        "--count",
        action="store_true",
        help="count the memory of the first one by running its step on fake tensors, in minutes",
    )
    parser.add_argument("--json", metavar="FILE", help="write all layouts; - prints them alone")
    parser.add_argument("--plot", metavar="FILE.png", help="a picture of all layouts")
    parser.add_argument(
        "--calibrate", metavar="FILE", help="measure this machine, and write it as a file for --gpu"
    )
    parser.set_defaults(run=commands.plan)


def _part(text: str) -> tuple[int, int]:
    number, _, parts = text.partition("/")
    if number.isdecimal() and parts.isdecimal() and 1 <= int(number) <= int(parts):
        return int(number), int(parts)
    raise argparse.ArgumentTypeError(f"{text!r} is not K/N with K from 1 to N, such as 3/64")


def _mapping(text: str) -> dict:
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError:
        found = None
    if isinstance(found, dict):
        return found
    raise argparse.ArgumentTypeError(f"{text!r} is no mapping such as {{anon: true}}")


def _count(text: str, least: int = 0) -> int:
    if not text.isdigit() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
    return int(text)


_positive = partial(_count, least=1)


if __name__ == "__main__":
    sys.exit(main())
