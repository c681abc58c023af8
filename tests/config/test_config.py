"""The config: what a file and overrides become, and what a user is told when they are wrong."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from parallel_clip.config import (
    Config,
    config_from_dict,
    load_config,
    parse_bytes,
    parse_seconds,
    resume_differences,
)
from parallel_clip.config.docs import with_key_table
from parallel_clip.config.file import apply_override, read_yaml, write_yaml
from parallel_clip.config.schema import keys_of
from parallel_clip.errors import InputError

SMALL = {"train": {"steps": 10}, "data": {"train": [{"shards": "a.tar"}]}}

# The keys and defaults that users' files rely on.
CONTRACT = yaml.safe_load("""
model:    {name: null, override: []}
init:     {from: null}
loss:     {kind: infonce, duplicates: none, label_smoothing: 0.0}
parallel: {tensor: 1, pipeline: 1, virtual_pipeline: 1, sequence: false, schedule: auto}
batch:    {global: 32768, micro: 256}
precision: bf16
recompute: none
train:    {steps: null, samples: null, epochs: null}
optimizer: {lr: 5.0e-4, betas: [0.9, 0.98], eps: 1.0e-6, weight_decay: 0.2, clip_grad_norm: null}
schedule: {kind: cosine, warmup: 2000, cooldown: 0, min_lr: 0.0}
data:
  augment: train
  augment_options: {}
  tokenizer: null
  workers: 4
  max_bad_fraction: 0.01
checkpoint: {every: 1000, keep: 3}
evaluate: {every: 0, loss: null, retrieval: null, zero_shot: null}
log:      {every: 10, ledger: false}
ema:      {decay: null}
deterministic: false
seed: 0
run_dir: runs/demo
""")


def merged(changes: dict) -> dict:
    """SMALL with `changes` laid over it, section by section."""
    return SMALL | {
        key: SMALL.get(key, {}) | value if isinstance(value, dict) else value
        for key, value in changes.items()
    }


def complaint(changes: dict) -> str:
    with pytest.raises(InputError) as caught:
        config_from_dict(merged(changes))
    return str(caught.value)


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_every_contract_key_has_its_default():
    tree = Config().to_tree()
    for name, expected in CONTRACT.items():
        if isinstance(expected, dict):
            assert {key: tree[name][key] for key in expected} == expected
        else:
            assert tree[name] == expected


def test_every_key_is_described():
    assert [path for path, field in keys_of(Config) if not field.description] == []


def test_names_that_python_reserves_go_by_alias_and_by_name():
    config = config_from_dict(merged({"batch": {"global": 8}, "init": {"from": "x"}}))
    assert (config.batch.global_, config.init.from_) == (8, "x")


def test_a_file_with_overrides(tmp_path):
    path = write(tmp_path, "train: {steps: 10}\noptimizer: {lr: 1e-3}\n")
    config = load_config(
        path,
        [
            "data.train.0.shards=data/{000000..000099}.tar",
            "data.train.1.shards=[b.tar, c.tar]",
            "data.train.1.weight=2",
            "optimizer.eps=1E-7",
            "init.from=",
            "evaluate.zero_shot.shards=z.tar",
            "evaluate.zero_shot.classes=names.txt",
            "optimizer.betas=[0.8, 0.9]",
            "run_dir=runs/a=b",
        ],
    )
    assert config.optimizer.lr == 1e-3
    assert config.optimizer.eps == 1e-7
    assert config.optimizer.betas == (0.8, 0.9)
    assert [source.shards for source in config.data.train] == [
        "data/{000000..000099}.tar",
        ["b.tar", "c.tar"],
    ]
    assert [source.weight for source in config.data.train] == [1.0, 2.0]
    assert config.init.from_ is None
    assert config.evaluate.zero_shot.classes == "names.txt"
    assert config.run_dir == "runs/a=b"


def test_an_override_wins_over_the_file_and_the_last_one_over_the_first(tmp_path):
    path = write(tmp_path, write_yaml(SMALL))
    assert load_config(path, ["train.steps=20", "train.steps=30"]).train.steps == 30


@pytest.mark.parametrize(
    ("text", "value"),
    [("5e-4", 5e-4), ("5E4", 5e4), ("-1.5e+3", -1500.0), ("5.0e-4", 5e-4), ("1_0e2", 1000.0)],
)
def test_numbers_in_exponent_form(text, value):
    assert read_yaml(text, "test") == value


@pytest.mark.parametrize("text", ["e5", "5e", "1e5x", "'5e-4'", "ViT-L-14"])
def test_text_that_is_no_number(text):
    assert isinstance(read_yaml(text, "test"), str)


def test_written_yaml_reads_back_as_the_same_config(tmp_path):
    config = config_from_dict(
        merged({"run_dir": "5e-4", "seed": 3, "optimizer": {"lr": 1 / 3}, "init": {"from": "null"}})
    )
    assert load_config(write(tmp_path, config.to_yaml())) == config


@given(
    st.dictionaries(
        st.text(min_size=1),
        st.one_of(st.text(), st.integers(), st.floats(allow_nan=False), st.none(), st.booleans()),
    )
)
def test_yaml_round_trip(tree):
    assert read_yaml(write_yaml(tree), "test") == tree


@pytest.mark.parametrize(
    ("changes", "unknown", "nearest"),
    [
        ({"batch": {"globl": 8}}, "batch.globl", "batch.global"),
        ({"parallel": {"tensr": 2}}, "parallel.tensr", "parallel.tensor"),
        (
            {"parallel": {"stages": {"vison": [1], "vision": [1], "text": [1]}}},
            "parallel.stages.vison",
            "parallel.stages.vision",
        ),
        ({"parallel": {"stage": {}}}, "parallel.stage", "parallel.stages"),
        ({"lr": 1e-3}, "lr", "optimizer.lr"),
        ({"trian": {"steps": 3}}, "trian", "train"),
        ({"optimizer": {"warmup": 3}}, "optimizer.warmup", "schedule.warmup"),
        ({"data": {"train": [{"shardz": "a"}]}}, "data.train.0.shardz", "data.train.0.shards"),
        ({3: 4}, "3", ""),
    ],
)
def test_an_unknown_key_names_the_nearest_one(changes, unknown, nearest):
    assert f"unknown key {unknown}; did you mean {nearest}" in complaint(changes)


def test_an_unknown_key_among_the_overrides(tmp_path):
    with pytest.raises(InputError, match="unknown key parallel.tensors; did you mean parallel.ten"):
        load_config(write(tmp_path, write_yaml(SMALL)), ["parallel.tensors=2"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parallel": {"tensor": "two"}}, 'parallel.tensor is "two"; expected integer ≥ 1'),
        ({"parallel": {"tensor": 0}}, "parallel.tensor is 0; expected integer ≥ 1"),
        ({"parallel": {"tensor": True}}, "parallel.tensor is true; expected integer ≥ 1"),
        ({"parallel": {"tensor": 2.0}}, "parallel.tensor is 2.0; expected integer ≥ 1"),
        ({"parallel": {"sequence": 1}}, "parallel.sequence is 1; expected true or false"),
        ({"precision": "fp16"}, 'precision is "fp16"; expected one of fp32, bf16'),
        ({"loss": {"kind": "clip"}}, 'loss.kind is "clip"; expected one of infonce, sigmoid'),
        *[
            (
                {"loss": {"duplicates": wrong}},
                f"loss.duplicates is {shown}; expected one of none, tokens or key:NAME",
            )
            for wrong, shown in [("captions", '"captions"'), ("key:", '"key:"'), (None, "null")]
        ],
        (
            {"loss": {"label_smoothing": 1.0}},
            "loss.label_smoothing is 1.0; expected number ≥ 0 and < 1",
        ),
        ({"optimizer": {"lr": -1}}, "optimizer.lr is -1; expected number ≥ 0"),
        (
            {"optimizer": {"layer_decay": {"visual": 0.5}}},
            'optimizer.layer_decay is {"visual": 0.5}; expected number > 0 and ≤ 1 or mapping with '
            "vision, text, each number > 0 and ≤ 1 or null",
        ),
        ({"optimizer": {"layer_decay": 1.5}}, "optimizer.layer_decay is 1.5; expected number > 0"),
        ({"optimizer": {"no_decay": "openclip5"}}, 'optimizer.no_decay is "openclip5"; expected'),
        ({"optimizer": {"lr": float("inf")}}, "optimizer.lr is Infinity; expected number ≥ 0"),
        (
            {"optimizer": {"betas": [0.9, 1.0]}},
            "optimizer.betas is [0.9, 1.0]; expected list of 2, each number ≥ 0 and < 1",
        ),
        ({"ema": {"decay": 1}}, "ema.decay is 1; expected number > 0 and < 1 or null"),
        ({"optimizer": {"betas": 0.9}}, "optimizer.betas is 0.9; expected list of 2"),
        (
            {"parallel": {"stages": {"vision": [8, -1], "text": [4, 4]}}},
            "parallel.stages.vision is [8, -1]; expected list, each integer ≥ 0",
        ),
        (
            {"parallel": {"stages": {"vision": 8, "text": [4]}}},
            "parallel.stages.vision is 8; expected list, each integer ≥ 0",
        ),
        (
            {"parallel": {"stages": {"vision": [8, 8]}}},
            "parallel.stages.text is missing; expected list, each integer ≥ 0",
        ),
        (
            {"parallel": {"stages": [8, 8]}},
            "parallel.stages is [8, 8]; expected mapping with vision, text or null",
        ),
        ({"parallel": {"stash": "all"}}, 'parallel.stash is "all"; expected integer ≥ 0 or auto'),
        ({"parallel": {"stash": -1}}, "parallel.stash is -1; expected integer ≥ 0 or auto"),
        ({"parallel": {"stash": True}}, "parallel.stash is true; expected integer ≥ 0 or auto"),
        (
            {"parallel": {"memory": 0}},
            "parallel.memory is 0; expected text or integer ≥ 1 or null",
        ),
        ({"model": {"name": 14}}, "model.name is 14; expected text"),
        ({"log": None}, "log is null; expected mapping with every, ledger"),
        ({"data": {"train": "a.tar"}}, 'data.train is "a.tar"; expected list, each mapping'),
        ({"data": {"train": ["a.tar"]}}, 'data.train is ["a.tar"]; expected list, each mapping'),
        ({"data": {"train": [{}]}}, "data.train.0.shards is missing; expected text or list"),
        *[
            (
                {"data": {"caption_key": key}},
                f"data.caption_key is {shown}; expected text or mapping, each number > 0 or null",
            )
            for key, shown in [
                (3, "3"),
                (["a"], '["a"]'),
                ({}, "{}"),
                ({"a": 0}, '{"a": 0}'),
                ({"a": 0.5, "b": -1}, '{"a": 0.5, "b": -1}'),
                ({"a": "0.5"}, '{"a": "0.5"}'),
                ({"a": True}, '{"a": true}'),
                ({"a": float("inf")}, '{"a": Infinity}'),
                ({1: 0.5}, '{"1": 0.5}'),
            ]
        ],
        (
            {"data": {"train": [{"shards": "a", "caption_key": {"a": 0}}]}},
            'data.train.0.caption_key is {"a": 0}; expected text or mapping, each number > 0',
        ),
        ({"data": {"max_pixels": 0}}, "data.max_pixels is 0; expected integer ≥ 1"),
        ({"data": {"empty_caption": "drop"}}, 'data.empty_caption is "drop"; expected one of bad'),
        ({"evaluate": {"zero_shot": {"shards": "z"}}}, "evaluate.zero_shot.classes is missing"),
        ({"freeze": {"vision": "some"}}, 'freeze.vision is "some"; expected all or mapping with'),
        ({"freeze": {"text": [1]}}, "freeze.text is [1]; expected all or mapping with"),
        (
            {"freeze": {"vision": {"unlocked_groups": -1}}},
            "freeze.vision.unlocked_groups is -1; expected integer ≥ 0",
        ),
        (
            {"freeze": {"vision": {"unlocked": 1}}},
            "unknown key freeze.vision.unlocked; did you mean freeze.vision.unlocked_groups?",
        ),
    ],
)
def test_a_wrong_value_is_told_with_what_was_expected(changes, message):
    assert complaint(changes).startswith(message)


def test_all_problems_are_told_at_once_and_each_once():
    message = complaint(
        {"batch": {"micro": "x"}, "seed": -1, "data": {"train": [{"shards": 3}]}, "lr": 1}
    )
    assert message.startswith("the config has 4 problems:\n")
    for part in ("batch.micro is", "seed is -1", "data.train.0.shards is 3", "unknown key lr"):
        assert message.count(part) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": {"steps": None}}, "exactly one of train.steps, train.samples and train.epochs"),
        ({"train": {"steps": 3, "epochs": 1}}, "given: train.steps and train.epochs"),
        ({"data": {"train": []}}, "data.train names no shards"),
        ({"parallel": {"virtual_pipeline": 2}}, "parallel.virtual_pipeline 2 needs"),
        ({"parallel": {"memory": "plenty"}}, "parallel.memory plenty is no size of a memory"),
        *[
            ({"data": {"train": [{"shards": "a"} | source], **data}}, f"{key}.caption_lines is for")
            for data, source, key in [
                ({"caption_lines": True, "caption_key": "alt"}, {}, "data"),
                ({"caption_lines": True}, {"caption_key": {"a": 1}}, "data"),
                ({"caption_key": "alt"}, {"caption_lines": True}, "data.train.0"),
                ({}, {"caption_lines": True, "caption_key": "alt"}, "data.train.0"),
            ]
        ],
        *[
            ({"data": {"captions_per_image": 2} | data}, "data.captions_per_image 2 is for samples")
            for data in (
                {},
                {"caption_lines": True, "train": [{"shards": "a", "caption_lines": False}]},
            )
        ],
        (
            {"loss": {"kind": "sigmoid", "label_smoothing": 0.1}},
            "loss.label_smoothing 0.1 is for loss.kind infonce",
        ),
        ({"schedule": {"cooldown": 5}}, "schedule.cooldown is for schedule.kind wsd, not cosine"),
        ({"schedule": {"kind": "constant", "min_lr": 1e-5}}, "schedule.min_lr is for"),
        ({"schedule": {"min_lr": 1.0}}, "schedule.min_lr 1 is above optimizer.lr 0.0005"),
        ({"schedule": {"kind": "wsd", "warmup": 8, "cooldown": 5}}, "more than train.steps 10"),
        (
            {"freeze": {"vision": "all"}, "optimizer": {"lr_vision": 0, "lr_text": 1}},
            "optimizer.lr_vision 0 is for a tower that freeze.vision all does not train",
        ),
        (
            {"freeze": {"text": "all"}, "optimizer": {"layer_decay": {"text": 0.5}}},
            "optimizer.layer_decay.text 0.5 is for a tower that freeze.text all",
        ),
        (
            {"freeze": {"text": "all", "vision": "all"}, "optimizer": {"layer_decay": 0.5}},
            "optimizer.layer_decay 0.5 is for towers, and both are frozen",
        ),
        (
            {"optimizer": {"lr": 0, "lr_text": 1e-5, "lr_logit": 0}},
            "optimizer.lr is 0, and optimizer.lr_text 1e-05, optimizer.lr_logit 0 would be parts",
        ),
        ({"ema": {"every": 3}}, "ema.every 3 is for an average of the weights; give ema.decay"),
        ({"evaluate": {"ema": True}}, "evaluate.ema is for an average of the weights"),
        ({"evaluate": {"every": 5}}, "evaluate.every 5 has nothing to evaluate"),
    ],
)
def test_keys_that_contradict_one_another(changes, message):
    assert message in complaint(changes)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("batch.micro", "write it as key=value"),
        ("=3", "write it as key=value"),
        ("batch..micro=3", "write it as key=value"),
        ("train.steps.x=3", "train.steps is 10, with no keys below it"),
        ("data.train.2.shards=a", "'2' is not one of its places 0 to 1"),
        ("data.train.x.shards=a", "data.train is a list of 1"),
        ("data.train.0.shards={a,b}.tar", """'data.train.0.shards="{a,b}.tar"'"""),
    ],
)
def test_an_override_that_cannot_be_placed(tmp_path, override, message):
    with pytest.raises(InputError) as caught:
        load_config(write(tmp_path, write_yaml(SMALL)), [override])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: [1", "line 1"),
        ("seed: 1\nseed: 2\n", "line 2, column 1: not valid YAML: the key 'seed' is given twice"),
        ("- seed", "a config is a mapping"),
        ("seed: !!python/object/apply:os.getcwd []", "not valid YAML"),
        ("run_dir: 2024-13-45", "not valid YAML"),
        ("? {a: 1}\n: 2\n", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_config(tmp_path, text, message):
    with pytest.raises(InputError) as caught:
        load_config(write(tmp_path, text))
    assert message in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match="cannot read the config file .*nowhere.yaml: No such"):
        load_config(tmp_path / "nowhere.yaml")
    (tmp_path / "picture").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(InputError, match="it is not UTF-8 text"):
        load_config(tmp_path / "picture")


def test_an_override_opens_a_section_that_is_null():
    tree = {"evaluate": {"zero_shot": None}}
    apply_override(tree, "evaluate.zero_shot.shards=z.tar")
    assert tree == {"evaluate": {"zero_shot": {"shards": "z.tar"}}}


def test_stages_by_hand_from_overrides(tmp_path):
    path = write(tmp_path, write_yaml(SMALL))
    whole = load_config(path, ["parallel.stages={vision: [9, 8, 7], text: [4, 4, 4]}"])
    by_tower = ["parallel.stages.vision=[9, 8, 7]", "parallel.stages.text=[4, 4, 4]"]
    stages = whole.parallel.stages
    assert (stages.vision, stages.text) == ([9, 8, 7], [4, 4, 4])
    assert load_config(path, by_tower) == whole
    assert load_config(write(tmp_path, whole.to_yaml())) == whole


@pytest.mark.parametrize("stash", ["auto", 0, 3])
def test_stash_is_a_number_or_auto(tmp_path, stash):
    config = load_config(write(tmp_path, write_yaml(SMALL)), [f"parallel.stash={stash}"])
    assert config.parallel.stash == stash
    assert load_config(write(tmp_path, config.to_yaml())) == config


@pytest.mark.parametrize(
    ("size", "count"),
    [
        ("80GB", 80_000_000_000),
        ("80GiB", 85_899_345_920),
        ("0.5 GB", 500_000_000),
        ("512MiB", 536_870_912),
        ("2TB", 2_000_000_000_000),
        ("1234", 1234),
        (1234, 1234),
    ],
)
def test_sizes_of_memories(size, count):
    assert parse_bytes(size) == count
    assert config_from_dict(merged({"parallel": {"memory": size}})).parallel.memory == size


@pytest.mark.parametrize("size", ["", "GB", "80gb", "80G", "-1GB", "0GB", "80GB80", "1e9", "0.5"])
def test_what_is_no_size_of_a_memory(size):
    with pytest.raises(InputError, match="--gpu-memory .*is no size of a memory; .* such as 80GB"):
        parse_bytes(size, "--gpu-memory")


FREE = {
    "parallel": {
        "tensor": 2,
        "sequence": True,
        "distributed_optimizer": False,
        "pipeline": 2,
        "stages": {"vision": [6, 6], "text": [5, 7]},
        "memory": "80GB",
    },
    "batch": {"micro": 4},
    "recompute": "full",
    "data": {"workers": 0, "prefetch": 9},
    "log": {"every": 1, "ledger": True},
    "evaluate": {"every": 5, "loss": "b.tar"},
    "checkpoint": {"every": 7, "keep": None, "async": True, "failures": 2, "fallback": True},
    "loss": {"exchange": "ring", "stages": "last", "tile": 64},
    "train": {"time_limit": "23h30m"},
    "watchdog": {"timeout": 60},
    "plan": {"check": "warn", "device": "h100"},
    "bad_steps": {"action": "skip", "spike": 10},
    "run_dir": "elsewhere",
}


def test_what_may_differ_on_resume():
    saved = config_from_dict(SMALL)
    assert resume_differences(saved, saved) == ([], [])
    assert resume_differences(saved, config_from_dict(merged(FREE))) == ([], [])


def test_what_may_not_differ_on_resume():
    new = {
        "batch": {"global": 8},
        "seed": 1,
        "optimizer": {"betas": [0.9, 0.95]},
        "data": {"train": [{"shards": "b.tar"}, {"shards": "c.tar"}]},
    }
    assert resume_differences(config_from_dict(SMALL), config_from_dict(merged(new))).refused == [
        "batch.global: 32768 → 8",
        "optimizer.betas: [0.9, 0.98] → [0.9, 0.95]",
        "seed: 0 → 1",
        "data.train.1.weight: null → 1.0",
    ]


def test_what_the_loss_takes_for_a_target_may_not_differ_on_resume():
    new = merged({"loss": {"duplicates": "key:url", "label_smoothing": 0.1}})
    refused = ['loss.duplicates: "none" → "key:url"', "loss.label_smoothing: 0.0 → 0.1"]
    assert resume_differences(config_from_dict(SMALL), config_from_dict(new)).refused == refused
    new["resume"] = {"allow": ["loss.duplicates", "loss.label_smoothing"]}
    assert resume_differences(config_from_dict(SMALL), config_from_dict(new)) == ([], refused)


def test_what_is_a_caption_may_not_differ_on_resume():
    one = {"train": [{"shards": "a.tar", "caption_key": {"a": 1}}], "caption_key": {"b": 0.5}}
    new = {
        "train": [{"shards": "a.tar", "caption_key": {"a": 2}, "caption_lines": False}],
        "caption_key": {"b": 0.25, "c": 1.0}, "empty_caption": "keep", "max_pixels": 10**9,
    }  # fmt: skip
    saved, changed = (config_from_dict(merged({"data": data})) for data in (one, new))
    assert resume_differences(saved, changed).refused == [
        "data.train.0.caption_key.a: 1.0 → 2.0",
        "data.train.0.caption_lines: null → false",
        "data.caption_key.b: 0.5 → 0.25",
        'data.empty_caption: "bad" → "keep"',
        "data.max_pixels: 178956970 → 1000000000",
        "data.caption_key.c: null → 1.0",
    ]


def test_keys_with_weights_are_written_and_read_in_their_order(tmp_path):
    keys = {"z": 0.5, "a": 1.0, "m.n": 0.5}
    config = config_from_dict(merged({"data": SMALL["data"] | {"caption_key": keys}}))
    again = load_config(write(tmp_path, config.to_yaml()))
    assert list(again.data.caption_key.items()) == list(keys.items())
    path = write(tmp_path, write_yaml(SMALL))
    assert load_config(path, ["data.caption_key={a: 0.7, b: 3}"]).data.caption_key == {
        "a": 0.7, "b": 3
    }  # fmt: skip


def test_what_is_allowed_may_differ_and_is_told():
    new = merged({"optimizer": {"lr": 0.5, "eps": 1e-8}, "resume": {"allow": ["optimizer.lr"]}})
    found = resume_differences(config_from_dict(SMALL), config_from_dict(new))
    assert found.accepted == ["optimizer.lr: 0.0005 → 0.5"]
    assert found.refused == ["optimizer.eps: 1e-06 → 1e-08"]
    new["resume"]["allow"] = ["optimizer"]
    assert resume_differences(config_from_dict(SMALL), config_from_dict(new)).refused == []


def test_learning_rates_of_parts_may_differ_only_where_allowed(tmp_path):
    path = write(tmp_path, write_yaml(SMALL | {"optimizer": {"no_decay": "openclip4"}}))
    saved = load_config(path)
    overrides = ["optimizer.lr_text=1e-5", "optimizer.layer_decay.vision=0.75"]
    overrides.append("optimizer.no_decay=['*embedding']")
    new = load_config(path, overrides)
    assert new.optimizer.layer_decay == {"vision": 0.75}
    told = [
        "optimizer.lr_text: null → 1e-05",
        'optimizer.no_decay: "openclip4" → ["*embedding"]',
        "optimizer.layer_decay.vision: null → 0.75",
    ]
    assert resume_differences(saved, new).refused == told
    allow = "resume.allow=[optimizer.lr_text,optimizer.layer_decay,optimizer.no_decay]"
    assert resume_differences(saved, load_config(path, [*overrides, allow])).accepted == told


@pytest.mark.parametrize("name", ["batch.global", "batch", "seed", "model", "model.name", "data"])
def test_what_the_order_depends_on_cannot_be_allowed(name):
    with pytest.raises(InputError, match="with init.from"):
        config_from_dict(SMALL | {"resume": {"allow": [name]}})


def test_a_key_that_is_none_cannot_be_allowed():
    with pytest.raises(InputError, match="optimizer.lrr', which is no key"):
        config_from_dict(SMALL | {"resume": {"allow": ["optimizer.lrr"]}})


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("23h30m", 84600), ("1d2h", 93600), ("90m", 5400), ("45s", 45), ("1h 5s", 3605), (90, 90)],
)
def test_times(time, seconds):
    assert parse_seconds(time, "train.time_limit") == seconds


@pytest.mark.parametrize("time", ["", "5", "h", "12x", "0s", "30m23h"])
def test_what_is_no_time(time):
    with pytest.raises(InputError, match="train.time_limit"):
        config_from_dict(SMALL | {"train": {"steps": 1, "time_limit": time}})


@pytest.mark.parametrize(
    ("kind", "before", "after", "allowed"),
    [
        ("constant", {"steps": 10}, {"steps": 20}, True),
        ("constant", {"steps": 10}, {"steps": 5}, False),
        ("constant", {"epochs": 1.0}, {"epochs": 2.5}, True),
        ("constant", {"steps": 10}, {"epochs": 20.0}, False),
        ("cosine", {"steps": 10}, {"steps": 20}, False),
    ],
)
def test_a_longer_run_on_resume(kind, before, after, allowed):
    saved, new = (
        config_from_dict(SMALL | {"train": train, "schedule": {"kind": kind}})
        for train in (before, after)
    )
    assert (resume_differences(saved, new).refused == []) == allowed


@pytest.mark.parametrize(("until", "allowed"), [("50%", False), (3, True)])
@pytest.mark.parametrize("key", ["phases", "freeze"])
def test_a_run_is_lengthened_where_nothing_moves_with_its_length(key, until, allowed):
    changes = {"phases": [{"until": until}, {"lr": 0.1}]}
    if key == "freeze":
        changes = {"freeze": {"text": {"unfreeze_at": until}}}
    saved = config_from_dict(merged(changes | {"schedule": {"kind": "constant", "warmup": 0}}))
    longer = saved.model_copy(update={"train": saved.train.model_copy(update={"steps": 20})})
    assert bool(resume_differences(saved, longer).refused) != allowed


def test_phases_may_differ_only_where_allowed():
    saved = config_from_dict(merged({"phases": [{"until": "50%"}, {"resolution": 32}]}))
    changes = {"phases": [{"until": "60%"}, {"resolution": 32}]}
    assert resume_differences(saved, config_from_dict(merged(changes))) == (
        ['phases.0.until: "50%" → "60%"'],
        [],
    )
    allowed = config_from_dict(merged({"resume": {"allow": ["phases"]}}))
    assert not resume_differences(saved, allowed).refused


def test_the_documentation_holds_todays_keys():
    page = Path(__file__).parents[2].joinpath("docs/configuration.md").read_text(encoding="utf-8")
    assert with_key_table(page) == page, (
        "run: python -m parallel_clip.config_docs docs/configuration.md"
    )
