"""The search for layouts against trying every one of them, and what it says."""

import json
from dataclasses import replace
from itertools import product

import pytest

from parallel_clip import cli
from parallel_clip.config import config_from_dict, load_config
from parallel_clip.engine.groups import close_groups, join_world, make_groups
from parallel_clip.engine.launch import Launch
from parallel_clip.layout import Layout, divisors
from parallel_clip.model.openclip_json import architecture_from_json
from parallel_clip.plan.fast_memory import FastMemory
from parallel_clip.plan.layout_plan import DoesNotFit, make_layout_plan, try_layout_plan
from parallel_clip.plan.memory import peak_memory
from parallel_clip.plan.planner_plot import front
from parallel_clip.plan.rank_bytes import StepMemory
from parallel_clip.plan.rank_process import CONTEXT_BYTES, GPU_PROCESS
from parallel_clip.plan.search import (
    LayoutSearch,
    PlannedLayout,
    tensor_sizes,
    with_layout,
    with_micro,
    with_stash,
)
from parallel_clip.plan.step_time import StepTime

TOWER = {"width": 512, "layers": 4}
MODEL = {
    "embed_dim": 64,
    "vision_cfg": {**TOWER, "image_size": 64, "patch_size": 8, "head_width": 64},
    "text_cfg": {**TOWER, "heads": 8, "context_length": 77, "vocab_size": 1000},
}
SMALL = architecture_from_json(MODEL, "small")
GPUS = 8


def small_config(**settings):
    return config_from_dict(
        {
            "train": {"steps": 1000},
            "data": {"train": [{"shards": "none.tar"}]},
            "batch": {"global": 4096, "micro": 16},
            "precision": "bf16",
            **settings,
        }
    )


def seconds_of(plan, config) -> StepTime:
    """A double that knows what a layout costs in kind: work, recomputation, the second forward,
    waiting, starting of kernels, and communication of tensor ranks."""
    layout, batch = plan.layout, plan.batch
    again = {"none": 0, "selective": 0.1, "full": 1}[config.recompute]
    forwards = 3 + again + 1 - plan.stash / batch.microbatches
    padded = 1.2 if config.parallel.pad else 1
    work = padded * batch.global_batch * forwards / layout.world * (1 + 4 / batch.micro_batch)
    waiting = (layout.pipeline - 1) / layout.virtual_pipeline / batch.microbatches
    messages = 0.01 * layout.virtual_pipeline * (layout.pipeline > 1)
    seconds = work * (1 + waiting + messages + 0.05 * (layout.tensor - 1))
    return StepTime(
        seconds, waiting, work, {"tensor": 0.0}, 0.0, 0.0, batch.global_batch / seconds, 0
    )


@pytest.fixture(scope="module")
def memory():
    return FastMemory(small_config(), SMALL)


FEW = 4


def every_layout(memory, limit: int):
    """By brute force: each size, each microbatch, each recomputation, each stash."""
    costs = SMALL.costs
    sizes = [n for n in range(1, FEW + 1) if FEW % n == 0]
    for tensor, pipeline, virtual in product(sizes, sizes, range(1, 5)):
        if FEW % (tensor * pipeline) or (pipeline == 1 and virtual > 1):
            continue
        shape = with_layout(
            small_config(), tensor=tensor, pad=False, pipeline=pipeline, virtual=virtual
        )
        per_rank = 4096 * tensor * pipeline // FEW
        for micro, recompute in product(divisors(per_rank), ("none", "selective", "full")):
            config = with_micro(shape, micro).model_copy(update={"recompute": recompute})
            plan = try_layout_plan(costs, FEW, config)
            if isinstance(plan, DoesNotFit):
                continue
            count, group = plan.batch.microbatches, plan.microbatch_group or 1
            if virtual > 1 and count % pipeline:
                continue
            held = memory.stages(config, plan)
            step = StepMemory(plan, held, memory, recompute, GPU_PROCESS)
            for stash in {0, *range(count, 0, -max(group, count // 16 // group * group))}:
                if step.fullest(stash)[1].total <= limit:
                    yield seconds_of(replace(plan, stash=stash), with_stash(config, stash, count))


@pytest.mark.parametrize("gigabytes", [1.6, 2.2, 4, 12])
def test_nothing_that_was_passed_over_is_quicker(memory, gigabytes):
    limit = int(gigabytes * 1e9)
    search = LayoutSearch(small_config(), SMALL, FEW, limit, FEW, seconds_of)
    search.memory = memory
    found = search.run()
    best = min((time.seconds for time in every_layout(memory, limit)), default=None)
    if best is None:
        assert not found.layouts and found.refused
        return
    assert found.layouts[0].time.seconds <= best * (1 + 1e-9)
    assert all(each.memory.total <= limit for each in found.layouts)
    seconds = [each.time.seconds for each in found.layouts]
    assert seconds == sorted(seconds)


def test_small_microbatches_are_tried_where_larger_ones_need_recomputation(memory, monkeypatch):
    # With 4 rounds a step of 1,024 pairs has microbatches of 256, which fit with full
    # recomputation alone.
    monkeypatch.setattr("parallel_clip.plan.search.MOST_ROUNDS", 4)
    search = LayoutSearch(small_config(), SMALL, FEW, int(3e9), FEW, seconds_of)
    search.memory = memory
    layouts = [
        found
        for found in search.run().layouts
        if found.plan.layout.data == FEW  # one GPU a model
    ]
    by_recompute = {found.config.recompute: found.config.batch.micro for found in layouts}
    assert by_recompute["full"] >= 256 > by_recompute["selective"] >= by_recompute["none"]


def test_kinds_of_bytes_are_those_of_the_dry_run_and_estimates_beside_them(memory):
    config = small_config(batch={"global": 128, "micro": 16})  # whose loss takes little
    config = with_layout(config, tensor=2, pad=False, pipeline=2, virtual=1)
    plan = make_layout_plan(SMALL.costs, GPUS, config)
    held = memory.stages(config, plan)
    step = StepMemory(plan, held, memory, "none", GPU_PROCESS)
    for rank, of_stage in enumerate(held):
        found = step.of_stage(rank, 3)
        assert found.weights + found.gradients + found.optimizer == of_stage.state
        assert found.activations == peak_memory(plan, rank, 3, of_stage).activations
        assert found.total == of_stage.state + found.activations + found.loss + found.other
        assert found.other > CONTEXT_BYTES


def test_where_the_loss_fills_most_its_own_bytes_are_told(memory):
    config = with_micro(with_layout(small_config(), 1, False, pipeline=1, virtual=1), 1)
    plan = make_layout_plan(SMALL.costs, GPUS, config)
    step = StepMemory(plan, memory.stages(config, plan), memory, "full", GPU_PROCESS)
    found = step.of_stage(0, 0)
    assert found.activations == 0 and found.loss > plan.peak_loss_bytes(1)


def test_the_largest_stash_is_the_last_that_fits(memory):
    config = with_layout(small_config(), tensor=1, pad=False, pipeline=2, virtual=2)
    plan = make_layout_plan(SMALL.costs, GPUS, config)
    step = StepMemory(plan, memory.stages(config, plan), memory, "none", GPU_PROCESS)
    enough = step.fullest(4)[1].total
    assert step.largest_stash(enough) == 4 and step.largest_stash(enough - 1) == 2
    assert step.largest_stash(10**6) is None


def test_tensor_sizes_stay_in_a_node():
    assert tensor_sizes(128, 8) == [1, 2, 4, 8]
    assert tensor_sizes(6, 8) == [1, 2, 3, 6]
    assert tensor_sizes(12, 4) == [1, 2, 4]


def test_the_front_has_what_none_beats():
    def layout(seconds, total):
        memory = type("", (), {"total": total})()
        return PlannedLayout(None, None, 0, memory, type("", (), {"seconds": seconds})())

    layouts = [layout(1, 50), layout(2, 60), layout(3, 40), layout(4, 45), layout(5, 10)]
    assert [each.time.seconds for each in front(layouts)] == [5, 3, 1]


@pytest.fixture
def run(tmp_path, capsys):
    """The command, on a small model's config: its exit code, standard output and error."""
    (tmp_path / "model.json").write_text(json.dumps(MODEL))
    (tmp_path / "config.yaml").write_text(
        f"model: {{name: {tmp_path}/model.json}}\nbatch: {{global: 4096, micro: 16}}\n"
        "train: {steps: 1000}\nprecision: bf16\n"
        "data: {train: [{shards: not-there.tar}]}\n"
    )

    def run(*arguments, config=True):
        given = [str(tmp_path / "config.yaml")] if config else []
        code = cli.main(["plan", *given, *arguments])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def test_the_lines_to_copy_are_the_plan(run, tmp_path):
    code, out, err = run("--gpus", "8", "--gpu-memory", "12GB", "--json", str(tmp_path / "a.json"))
    assert (code, err) == (0, "")
    first = json.loads((tmp_path / "a.json").read_text())["layouts"][0]
    lines = out.splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith("parallel: {"))
    copied = tmp_path / "copied.yaml"
    kept = (tmp_path / "config.yaml").read_text().splitlines()
    kept = [line for line in kept if not line.startswith("batch")]
    copied.write_text("\n".join([*kept, *lines[start : start + 3]]) + "\n")
    config = load_config(str(copied), [])
    plan = make_layout_plan(SMALL.costs, 8, config)
    assert plan.stash == first["stash"] and plan.batch.micro_batch == first["micro"]
    assert plan.layout.tensor == first["tensor"] and plan.layout.pipeline == first["pipeline"]
    memory = first["memory_bytes"]
    kinds = ("weights", "gradients", "optimizer", "activations", "loss", "other")
    assert sum(memory[kind] for kind in kinds) == memory["total"] <= 12e9
    assert first["days"] == pytest.approx(4_096_000 / first["samples_per_second"] / 86_400)
    assert {"bubble", "mfu", "step_seconds", "exchange", "schedule", "sequence"} <= first.keys()


def test_one_layout_alone(run):
    layout = "tensor=2,pipeline=2,micro=32,recompute=full"
    code, out, _ = run("--gpus", "8", "--gpu-memory", "12GB", "--json", "-", "--layout", layout)
    (found,) = json.loads(out)["layouts"]
    assert code == 0 and (found["tensor"], found["pipeline"], found["data"]) == (2, 2, 2)
    assert (found["micro"], found["recompute"]) == (32, "full")


def test_what_does_not_fit_is_refused_with_what_it_needs(run, tmp_path):
    target = tmp_path / "a.json"
    code, _, err = run("--gpus", "8", "--gpu-memory", "1GB", "--json", str(target))
    assert code == 2 and "no layout fits 1.0 GB on 8 GPUs: the least is" in err
    tree = json.loads(target.read_text())
    assert tree["layouts"] == [] and all(each["needs_bytes"] > 1e9 for each in tree["refused"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpus", "0", "--gpu-memory", "80GB"], "'0' is not a whole number of at least 1"),
        (["--gpus", "8", "--gpu-memory", "80"], "has no unit; write 80GB"),
        (["--gpus", "8", "--gpu-memory", "8XB"], "such as 80GB"),
        (["--gpus", "8"], "plan needs --gpu-memory 80GB"),
        (["--gpus", "8", "--gpu-memory", "8GB", "--layout", "tensor=3"], "does not divide"),
        (["--gpus", "8", "--gpu-memory", "8GB", "--layout", "tensr=3"], "'tensr=3' is none of"),
        (["--gpus", "8", "--gpu-memory", "8GB", "--gpu", "h1000"], "h100"),
        (["--gpus", "8", "--gpu-memory", "8GB", "--plot", "a.txt"], "name a .png"),
    ],
)
def test_nonsense_is_refused_with_the_way_out(run, arguments, said):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "") and said in err and "Traceback" not in err


def test_the_largest_batch_fits_and_twice_does_not(run):
    sizes = "--gpus", "8", "--gpu-memory", "4GB"
    code, out, _ = run(*sizes, "--max-batch", "--json", "-")
    tree = json.loads(out)
    assert code == 0 and tree["batch"] > 4096 and tree["batch"] % 8 == 0 and tree["layouts"]
    code, _, err = run(*sizes, f"batch.global={2 * tree['batch']}", "--json", "-")
    assert code == 2 and "no layout fits" in err


def test_epochs_have_no_days(run):
    sizes = "--gpus", "8", "--gpu-memory", "12GB", "--layout", "tensor=1"
    code, out, err = run(*sizes, "--json", "-", "train.steps=null", "train.epochs=3")
    assert code == 0, err
    assert json.loads(out)["layouts"][0]["days"] is None


def test_the_first_layouts_memory_is_counted_by_its_step(run):
    layout = "tensor=2,pipeline=2,micro=64,stash=1"
    given = ["--gpus", "8", "--gpu-memory", "12GB", "--layout", layout, "--count"]
    code, out, _ = run(*given, "--json", "-")
    assert code == 0
    tree = json.loads(out)
    memory, other = (tree["layouts"][0][key] for key in ("memory_bytes", "other_bytes"))
    tensors = memory["total"] - other["process"] - other["slack"]
    assert tree["counted_bytes"] == pytest.approx(tensors, rel=0.02)
    assert "counted: a step of 1 on fake tensors" in run(*given)[1]


def test_a_process_that_has_been_in_a_group_searches_by_itself():
    """Forked ones would wait for threads of gloo's that they lack."""
    join_world(Launch(0, 0, 1))
    make_groups(Layout(1))
    close_groups()
    search = LayoutSearch(small_config(), SMALL, FEW, 12 * 10**9, FEW, seconds_of)
    assert search.run().layouts


def test_a_picture_is_drawn(run, tmp_path):
    pytest.importorskip("matplotlib")
    target = tmp_path / "layouts.png"
    code, *_ = run("--gpus", "8", "--gpu-memory", "12GB", "--plot", str(target))
    assert code == 0 and target.read_bytes().startswith(b"\x89PNG")
