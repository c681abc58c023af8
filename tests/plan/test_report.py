"""What `train --dry-run` prints of stages."""

from pathlib import Path

import pytest

from parallel_clip.config import load_config
from parallel_clip.model.known_models import load_architecture
from parallel_clip.plan.describe import describe_run
from parallel_clip.plan.report import dry_run_report
from tests.launcher import run, succeed
from tests.plan.small_plans import small_plan
from tests.small_models import KINDS
from tests.small_world import make_world


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def rows(report: str, stages: int) -> list[list[str]]:
    """The lines of the table, cut into words; each begins with the stage's number."""
    lines = report.splitlines()
    start = next(i for i, line in enumerate(lines) if "vision layers" in line) + 2
    found = [line.split() for line in lines[start : start + stages]]
    assert [row[0] for row in found] == [str(stage) for stage in range(stages)]
    return found


def test_the_dry_run_of_vit_l_14_on_three_stages_deals_8_and_4_to_each(config):
    report = succeed(
        "train", config, "model.name=ViT-L-14", "batch.global=48", "batch.micro=4",
        "parallel.pipeline=3", "--dry-run", "--world-size", 6,
    )  # fmt: skip
    assert "ViT-L-14 on 6 processes: data 2 × tensor 1 × pipeline 3" in report
    found = rows(report, 3)
    assert [row[1:5] for row in found] == [
        ["8", "(0-7)", "4", "(0-3)"],
        ["8", "(8-15)", "4", "(4-7)"],
        ["8", "(16-23)", "4", "(8-11)"],
    ]
    # Of the model's 427.62 million; the first has the token embedding's 49,408 × 768.
    parameters = [float(row[5]) for row in found]
    assert sum(parameters) == pytest.approx(427.62, abs=0.02)
    assert parameters[0] - parameters[1] > 37.9
    assert {row[6] for row in found} == {"M"}
    assert max(float(row[8].rstrip("%")) for row in found) == 100
    assert "a rank of stage 0, the fullest," in report
    assert "saved activations of 3 microbatches" in report


def test_virtual_stages_of_a_rank_stand_beside_one_another(config):
    report = dry_run_report(
        load_config(config, ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]), 2
    )
    first, second = rows(report, 2)
    assert len(first) > 5 and "," in " ".join(first)
    assert "2 layers of width 32 on the stages: 1, 1, 0, 0" in report
    assert "Bubble: ranks wait" in report


def test_padding_is_told_where_there_is_some(config):
    batch = ["batch.global=8", "batch.micro=4", "parallel.pad=true"]
    report = dry_run_report(load_config(config, [*batch, "parallel.tensor=3"]), 3)
    (line,) = [line for line in report.splitlines() if "parallel.pad" in line]
    # s = 17 and 16 tokens; h = 32, d = 8, m = 128.
    vision, text = (2 * (2 * (8 * s * 32 * 8 + 4 * s**2 * 8) + 4 * s * 32) for s in (17, 16))
    total = load_architecture(str(config.parent / "model.json")).costs.total
    wasted = (vision + text) / (total + vision + text)
    assert line == (
        "  parallel.pad: vision 4 heads to 6, 128 MLP channels to 129; text 4 heads to 6, "
        f"128 MLP channels to 129: {wasted:.0%} of all FLOPs are on zeros"
    )
    assert "2 of 4 heads and 43 of 128 MLP channels on each tensor rank, or fewer" in report
    divided = dry_run_report(load_config(config, [*batch, "parallel.tensor=2"]), 2)
    assert "parallel.pad" not in divided and "or fewer" not in divided


def test_what_a_rank_holds_of_an_attention_pool_is_told(tmp_path):
    """Of PE-Core's 8 heads, where the tower's 12 are split evenly."""
    model = KINDS["timm-pe-core"]
    vision = model["vision_cfg"] | {"head_width": 4}
    text = model["text_cfg"] | {"vocab_size": 49408}
    model = model | {"vision_cfg": vision, "text_cfg": text}
    plan = small_plan(tmp_path, 1, model=model, tensor=3, pad=True)
    assert (
        "4 of 12 heads, 64 of 192 MLP channels, 3 of 8 heads of the pool and 64 of 192 MLP "
        "channels of the pool on each tensor rank, or fewer; 16 tokens" in describe_run(plan)
    )


def test_one_stage_needs_no_table(config):
    report = dry_run_report(load_config(config, []), 2)
    assert "vision layers" not in report and "Bubble" not in report
    assert "a rank holds" in report and "saved activations of 1 microbatch " in report


def test_a_memory_is_filled_with_stashed_microbatches(config):
    few = dry_run_report(load_config(config, ["batch.micro=2", "parallel.memory=80GB"]), 1)
    assert "keeping all graphs" in few and "saved activations of 4 microbatches" in few


def test_a_memory_that_is_too_little_ends_with_its_message(config):
    told = "plan.check=error", "parallel.memory=1MB"
    (ended,) = run("train", config, *told, "--dry-run", "--world-size", 1)
    assert ended.code == 2
    assert "a rank has 0.00 GB, parallel.memory 1MB" in ended.err
