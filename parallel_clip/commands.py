"""What each command does with its parsed options. Returns the exit code, None for 0.

Torch and megatron-core are imported by the command that needs them: `--help` is quick.
"""

from __future__ import annotations

import argparse
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from parallel_clip.config import load_config
from parallel_clip.engine.launch import Launch
from parallel_clip.errors import InputError


def train(options: argparse.Namespace, launch: Launch) -> None:
    config = load_config(options.config, options.overrides)
    if not options.dry_run:
        if options.world_size is not None:
            raise InputError("--world-size is for --dry-run; torchrun or srun start processes")
        from parallel_clip.engine.groups import close_groups
        from parallel_clip.plan.memory import fit_stash_to_memory
        from parallel_clip.plan.run_plan import make_run_plan
        from parallel_clip.training.loop import train as run

        run(fit_stash_to_memory(make_run_plan(config, launch.world_size)), launch)
        close_groups()
        return
    if launch.world_size > 1:
        raise InputError(
            "--dry-run runs in one process; start it without torchrun and add --world-size "
            f"{launch.world_size}"
        )
    from parallel_clip.plan.report import dry_run_report

    print(dry_run_report(config, options.world_size or 1))


def zero_shot(options: argparse.Namespace, launch: Launch) -> None:
    from parallel_clip.evaluate.prompts import read_classes, read_templates
    from parallel_clip.evaluate.zero_shot import encode_classes
    from parallel_clip.evaluate.zero_shot import zero_shot as run

    names, templates = read_classes(options.classes), read_templates(options.templates)
    encoder, data, group = _open_evaluation(options, launch, need="labels")
    classes = encode_classes(encoder, names, templates, options.batch, group)
    _report("Zero-shot classification", run(encoder, data, classes, group), options, launch)


def retrieval(options: argparse.Namespace, launch: Launch) -> None:
    from parallel_clip.evaluate.pairs import encode_pairs
    from parallel_clip.evaluate.retrieval import retrieval as run

    encoder, data, group = _open_evaluation(options, launch, need="captions")
    results = run(encode_pairs(encoder, data, options.batch, group))
    _report("Retrieval", results, options, launch)


def convert(options: argparse.Namespace, launch: Launch) -> None:
    if launch.world_size > 1:
        raise InputError("convert runs in one process; start it without torchrun")
    from parallel_clip.convert.open import convert_checkpoint

    source = convert_checkpoint(
        options.source, options.target, options.to, options.precision, options.bin, options.model
    )
    print(f"{source.architecture.name} from {source.folder} is now in {Path(options.target)}")


def data_index(options: argparse.Namespace, launch: Launch) -> None:
    from parallel_clip.data.index.shard_table import index_shards

    shards = index_shards(options.shards, renew=True, workers=options.workers)
    print(f"{len(shards):,} shards, {shards.samples:,} samples")


def data_check(options: argparse.Namespace, launch: Launch) -> int:
    from parallel_clip.data.tools.check import decode_all_shards
    from parallel_clip.data.tools.check_report import print_report, report_tree
    from parallel_clip.evaluate.results import check_json_target, write_json

    check_json_target(options.json)
    alone = options.json == "-"
    report = decode_all_shards(
        options.shards,
        _say_nothing if alone else print,
        caption_key=options.caption_key,
        workers=options.workers,
    )
    if not alone:
        print_report(report)
    if options.json is not None:
        write_json(report_tree(report), options.json)
    return 2 if report.broken else 0


def data_pack(options: argparse.Namespace, launch: Launch) -> None:
    from parallel_clip.data.tools.pack import pack_folder

    shards = pack_folder(
        Path(options.source), Path(options.target), samples_per_shard=options.samples_per_shard
    )
    print(f"{len(shards):,} shards in {options.target}")


def plan(options: argparse.Namespace, launch: Launch) -> None:
    raise InputError(
        "plan is not built yet; `parallel-clip train CONFIG --dry-run --world-size N` prints what "
        "one layout holds in memory"
    )


def doctor(options: argparse.Namespace, launch: Launch) -> None:
    import torch

    for package in ("torch", "torchvision", "megatron-core", "webdataset", "open_clip_torch",
                    "transformer-engine", "apex"):  # fmt: skip
        try:
            print(f"{package:20} {version(package)}")
        except PackageNotFoundError:
            print(f"{package:20} not installed")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"{'devices':20} {', '.join(devices) or 'none: training runs on the CPU over gloo'}")
    shared_memory = Path("/dev/shm")
    if shared_memory.is_dir():
        free = shutil.disk_usage(shared_memory).free / 2**30
        enough = "" if free >= 1 else "; data workers need more: docker run --ipc=host"
        print(f"{'shared memory':20} {free:.1f} GiB free{enough}")


def _open_evaluation(options: argparse.Namespace, launch: Launch, need: str):
    """The encoder, this data rank's part of the shards, and the group that shares the work."""
    from parallel_clip.data.feeding.evaluation_data import open_evaluation_data
    from parallel_clip.data.feeding.open import check_first_samples
    from parallel_clip.data.index.shard_table import index_shards, save_index
    from parallel_clip.engine.groups import open_groups
    from parallel_clip.evaluate.encoder import load_encoder
    from parallel_clip.evaluate.results import check_json_target
    from parallel_clip.layout import Layout

    check_json_target(options.json)
    groups = open_groups(Layout(launch.world_size, options.tensor), launch)
    encoder = groups.run_on_all_ranks(
        lambda: load_encoder(
            options.checkpoint,
            groups,
            model_name=options.model,
            tokenizer=options.tokenizer,
            precision=options.precision,
        )
    )

    alone = options.json == "-"
    say = _say_nothing if alone else print

    def look_into_data() -> None:
        shards = index_shards(options.data, say, save=False)
        check_first_samples(shards, need, options.caption_key)
        save_index(shards, say)

    groups.run_on_rank_zero(look_into_data)
    data = groups.run_on_all_ranks(
        lambda: open_evaluation_data(
            options.data,
            encoder.preprocess,
            encoder.tokenizer,
            rank=groups.data_rank,
            ranks=groups.layout.data,
            batch=options.batch,
            need=need,
            caption_key=options.caption_key,
            say=_say_nothing,
            check=False,
        )
    )
    return encoder, data, groups.data


def _report(title: str, results: dict, options: argparse.Namespace, launch: Launch) -> None:
    from parallel_clip.engine.groups import close_groups
    from parallel_clip.evaluate.results import print_table, write_json

    close_groups()
    if not launch.is_rank_zero:
        return
    if options.json != "-":
        print_table(title, results)
    if options.json is not None:
        write_json(results, options.json)


def _say_nothing(_: str) -> None:
    pass
