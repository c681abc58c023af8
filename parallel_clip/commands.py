"""What each command does with its parsed options. Returns the exit code, None for 0.

Torch and megatron-core are imported by the command that needs them: `--help` is quick.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from parallel_clip.config import load_config
from parallel_clip.engine.launch import Launch
from parallel_clip.errors import InputError


def train(options: argparse.Namespace, launch: Launch) -> None:
    if options.dry_run:
        return _dry_run(options, launch)
    if options.world_size is not None:
        raise InputError("--world-size is for --dry-run; torchrun or srun start processes")
    from parallel_clip.engine.groups import close_groups
    from parallel_clip.engine.rendezvous import broadcast_from_rank_zero
    from parallel_clip.training.start import plan_and_take_lease
    from parallel_clip.training.stop import StopRequests
    from parallel_clip.training.train import train as run

    requests = StopRequests(say=launch.is_rank_zero)
    requests.install()

    def plan_run():
        config = load_config(options.config, options.overrides)
        return plan_and_take_lease(config, launch.world_size, launch.local_size)

    (plan, token), kept = broadcast_from_rank_zero(plan_run, launch)
    shards, lease = kept if kept is not None else (None, None)
    try:
        run(plan, launch, shards, lease, token, requests)
        close_groups()
    finally:
        if lease is not None:
            lease.release()


def _dry_run(options: argparse.Namespace, launch: Launch) -> None:
    if launch.world_size > 1:
        raise InputError(
            "--dry-run runs in one process; start it without torchrun and add --world-size "
            f"{launch.world_size}"
        )
    from parallel_clip.plan.report import dry_run_report

    config = load_config(options.config, options.overrides)
    print(dry_run_report(config, options.world_size))


def zero_shot(options: argparse.Namespace, launch: Launch) -> None:
    from parallel_clip.evaluate.prompts import read_classes, read_templates
    from parallel_clip.evaluate.zero_shot import encode_classes
    from parallel_clip.evaluate.zero_shot import zero_shot as run

    names, templates = read_classes(options.classes), read_templates(options.templates)
    encoder, data, group = _open_evaluation(options, launch, need="labels")
    classes = encode_classes(encoder, names, templates, options.batch, group)
    _report("Zero-shot classification", run(encoder, data, classes, group), options, launch)


def retrieval(options: argparse.Namespace, launch: Launch) -> None:
    from parallel_clip.evaluate.retrieval import encode_pairs
    from parallel_clip.evaluate.retrieval import retrieval as run

    encoder, data, group = _open_evaluation(options, launch, need="captions")
    results = run(encode_pairs(encoder, data, options.batch, group))
    _report("Retrieval", results, options, launch)


def convert(options: argparse.Namespace, launch: Launch) -> None:
    if launch.world_size > 1:
        raise InputError("convert runs in one process; start it without torchrun")
    from parallel_clip.convert.choose_model import ModelChoice
    from parallel_clip.convert.open import convert_checkpoint

    if options.with_optimizer != (options.global_batch is not None):
        raise InputError(
            "--with-optimizer and --global-batch N belong together: N is the number of pairs in a "
            "batch of the run that the optimizer is from"
        )
    said = convert_checkpoint(
        options.source,
        options.target,
        options.to,
        options.precision,
        options.bin,
        ModelChoice(options.model, options.override),
        options.global_batch,
        options.license,
        options.ema,
        options.mix,
    )
    print("\n".join(said))


def checkpoint_list(options: argparse.Namespace, launch: Launch) -> int:
    return _print_checkpoints(options, verify=False)


def checkpoint_verify(options: argparse.Namespace, launch: Launch) -> int:
    return _print_checkpoints(options, verify=True)


def checkpoint_show(options: argparse.Namespace, launch: Launch) -> None:
    from parallel_clip.checkpoint.inspect import describe_checkpoint, find_checkpoints
    from parallel_clip.evaluate.results import check_json_target, write_json

    check_json_target(options.json)
    said = describe_checkpoint(find_checkpoints(options.run_folder)[-1])
    if options.json != "-":
        for name, value in said.items():
            print(f"{name:15} {value}")
    if options.json is not None:
        write_json(said, options.json)


def _print_checkpoints(options: argparse.Namespace, verify: bool) -> int:
    """2 where a checkpoint is not whole or damaged and that was asked for, else 0."""
    from parallel_clip.checkpoint.inspect import find_checkpoints, inspect_checkpoint
    from parallel_clip.checkpoint.table import print_checkpoints
    from parallel_clip.evaluate.results import check_json_target, write_json

    check_json_target(options.json)
    folders = find_checkpoints(options.run_folder)
    states = [inspect_checkpoint(folder, verify=verify) for folder in folders]
    if options.json != "-":
        print_checkpoints(states)
    if options.json is not None:
        write_json([asdict(state) for state in states], options.json)
    return 2 if verify and not all(state.verified for state in states) else 0


def data_index(options: argparse.Namespace, launch: Launch) -> None:
    from parallel_clip.data.index.renew import Part, renew_index

    if options.part and options.merge:
        raise InputError("--part scans a part, --merge makes the index of all: give one of them")
    _use_storage(options)
    shards = renew_index(
        options.shards,
        workers=options.workers,
        part=Part(*options.part) if options.part else None,
        merge=options.merge,
        out=options.out,
    )
    print(f"{len(shards):,} shards, {shards.samples:,} samples")


def data_check(options: argparse.Namespace, launch: Launch) -> int:
    from parallel_clip.data.storage.progress import print_nothing
    from parallel_clip.data.tools.check import decode_all_shards
    from parallel_clip.data.tools.check_report import print_report, report_tree
    from parallel_clip.evaluate.results import check_json_target, write_json

    check_json_target(options.json)
    _use_storage(options)
    alone = options.json == "-"
    report = decode_all_shards(
        options.shards,
        print_nothing if alone else print,
        caption_key=options.caption_key,
        max_pixels=options.max_pixels,
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


def plan(options: argparse.Namespace, launch: Launch) -> int | None:
    if options.calibrate is not None:
        return _calibrate(options, launch)
    _check_plan_options(options, launch)
    from parallel_clip.evaluate.results import check_json_target, write_json
    from parallel_clip.plan.planner import Question, answer
    from parallel_clip.plan.planner_json import answer_tree
    from parallel_clip.plan.planner_plot import check_plot_target, draw_layouts
    from parallel_clip.plan.planner_report import answer_words, nothing_fits

    check_json_target(options.json)
    check_plot_target(options.plot)
    found = answer(
        Question(
            load_config(options.config, options.overrides),
            options.gpus,
            options.gpu_memory,
            options.gpu,
            options.nodes_of,
            options.layout,
            options.max_batch,
            options.count,
        )
    )
    if options.json is not None:
        write_json(answer_tree(found), options.json)
    if not found.result.layouts:  # an answer too: the JSON says what each would need
        raise InputError(nothing_fits(found))
    if options.json != "-":
        print(answer_words(found))
    if options.plot is not None:
        draw_layouts(found, options.plot)


def _check_plan_options(options: argparse.Namespace, launch: Launch) -> None:
    if launch.world_size > 1:
        raise InputError("plan runs in one process; start it without torchrun")
    given = {
        "CONFIG": options.config,
        "--gpus N": options.gpus,
        "--gpu-memory 80GB": options.gpu_memory,
    }
    missing = [name for name, value in given.items() if value is None]
    if missing:
        raise InputError(
            f"plan needs {', '.join(missing)}: parallel-clip plan CONFIG --gpus 128 --gpu-memory "
            "80GB; or --calibrate FILE alone"
        )
    if options.layout is not None and options.max_batch:
        raise InputError("--layout is one layout of one batch, --max-batch looks for a batch")


def _calibrate(options: argparse.Namespace, launch: Launch) -> None:
    if options.config is not None or options.gpus is not None:
        raise InputError("--calibrate FILE measures this machine, and takes nothing beside it")
    from parallel_clip.plan.calibrate import calibrate

    device = calibrate(options.calibrate, launch)
    if launch.is_rank_zero:
        print(f"{device.name}: {options.calibrate}")


def doctor(options: argparse.Namespace, launch: Launch) -> None:
    from parallel_clip.engine.doctor import doctor_report

    print(doctor_report())


def _use_storage(options: argparse.Namespace) -> None:
    from parallel_clip.config import parse_bytes
    from parallel_clip.data.storage.addresses import StorageSettings, configure_storage

    cache = parse_bytes(options.cache, "--cache")
    configure_storage(StorageSettings(options.storage_options, cache=cache))


def _open_evaluation(options: argparse.Namespace, launch: Launch, need: str):
    """The encoder, this data rank's part of the shards, and the group that shares the work."""
    from parallel_clip.data.storage.progress import print_nothing
    from parallel_clip.engine.groups import join_world, make_groups
    from parallel_clip.evaluate.results import check_json_target
    from parallel_clip.evaluate.setup import open_evaluation
    from parallel_clip.layout import Layout

    check_json_target(options.json)
    _use_storage(options)
    join_world(launch)
    groups = make_groups(Layout(launch.world_size, options.tensor))
    encoder, data = open_evaluation(
        options.checkpoint,
        options.data,
        groups,
        need=need,
        batch=options.batch,
        workers=options.workers,
        caption_key=options.caption_key,
        max_pixels=options.max_pixels,
        model_name=options.model,
        override=options.override,
        tokenizer=options.tokenizer,
        precision=options.precision,
        ema=options.ema,
        say=print_nothing if options.json == "-" else print,
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
