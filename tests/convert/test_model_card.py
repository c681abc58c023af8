"""The model card: the facts that a checkpoint knows, and no others."""

import json
from dataclasses import replace

import pytest
from huggingface_hub import ModelCard, metadata_load

from parallel_clip.checkpoint.meta import Meta
from parallel_clip.config import config_from_dict
from parallel_clip.convert.model_card import check_license, model_card
from parallel_clip.convert.training_facts import TrainingFacts, read_training_facts, short_path
from parallel_clip.data.samples.transforms import Preprocess
from parallel_clip.errors import InputError
from parallel_clip.model.known_models import load_architecture

ARCHITECTURE = load_architecture("ViT-B-32")
PREPROCESS = Preprocess((224, 224))


def card(**options):
    arguments = {"tokenizer": None, "precision": "fp32", "to": "huggingface"} | options
    return model_card(ARCHITECTURE, PREPROCESS, **arguments)


def header(text, tmp_path):
    (tmp_path / "README.md").write_text(text)
    assert metadata_load(tmp_path / "README.md") == ModelCard(text).data.to_dict()
    return metadata_load(tmp_path / "README.md")


@pytest.mark.parametrize("license_name", [None, "apache-2.0", "other"])
def test_the_licence_is_the_one_that_is_given_or_none(tmp_path, license_name):
    text = card(license_name=license_name)
    assert header(text, tmp_path).get("license") == license_name
    assert ("Not stated" in text) == (license_name is None)


@pytest.mark.parametrize("name", ["Apache 2.0", "MIT", "", "mit\nmalicious: true", "[mit]"])
def test_a_licence_that_no_header_can_have_is_refused(name):
    with pytest.raises(InputError, match="no identifier of a licence"):
        check_license(name)


def test_the_model_is_described(tmp_path):
    text = card(to="openclip", precision="bf16", tokenizer="a/name")
    for words in ("# ViT-B-32", "12 layers of width 768 with 12 heads", "224 × 224 pixels",
                  "77 tokens of a vocabulary of 49,408", "151,277,313, in bf16", "| a/name |",
                  "mean 0.481 0.458 0.408", "local-dir:FOLDER"):  # fmt: skip
        assert words in text, words
    assert header(text, tmp_path)["library_name"] == "open_clip"


def test_what_is_not_known_is_not_in_it():
    text = card()
    assert "does not say how it was trained" in text
    for word in ("optimizer", "batch", "seed", "InfoNCE", "None", "Evaluated"):
        assert word not in text, word


def meta_of(**changes) -> Meta:
    config = config_from_dict(
        {
            "model": {"name": "ViT-B-32"},
            "init": {"from": "/home/me/secret/models/start"},
            "batch": {"global": 4096},
            "train": {"steps": 10},
            "data": {
                "train": [
                    {"shards": "s3://me:pass@bucket/laion/{00000..00009}.tar?X-Amz-Signature=abc"},
                    {"shards": ["/home/me/secret/cc/a.tar", "b.tar"]},
                ]
            },
        }
    ).to_record()
    meta = Meta.of_model(ARCHITECTURE, PREPROCESS.to_openclip(), None)
    meta = replace(
        meta,
        step=10,
        position=40_960,
        bad_samples=3,
        source_samples=(40_000, 960),
        data={"sources": [{"shards": 10, "samples": 100_000}, {"shards": 2, "samples": 1_000}]},
        config=config,
        layout={"data": 4, "tensor": 2, "pipeline": 1, "virtual_pipeline": 1},
        versions={"parallel_clip": "0.1.0", "torch": "2.9", "transformer_engine": None},
    )
    return replace(meta, **changes)


def test_the_facts_of_training(tmp_path):
    run = tmp_path / "run"
    folder = run / "checkpoints/step_00000010"
    folder.mkdir(parents=True)
    lines = [
        {"step": 5, "retrieval": {"image_to_text_recall@1": 0.1}},
        {"step": 10, "loss": 2.5, "retrieval": {"image_to_text_recall@1": 0.25, "images": 20}},
    ]
    (run / "evaluations.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 10, "lo')
    text = card(training=read_training_facts(folder, meta_of()))
    for words in (
        "| optimizer steps | 10 |",
        "| pairs seen | 40,960 |",
        "| training data | `laion/{00000..00009}.tar`; 10 shards, 100,000 pairs; 40,000 seen |",
        "| training data | `cc/a.tar, b.tar`; 2 shards, 1,000 pairs; 960 seen |",
        "could not be read | 3 |",
        "| loss | InfoNCE",
        "| batch | 4,096 pairs |",
        "AdamW, learning rate 0.0005, betas 0.9, 0.98, eps 1e-06, weight decay 0.2 |",
        "| learning rate | cosine, 2,000 steps of warmup |",
        "| weights began from | models/start |",
        "| layout | 4 × 2 × 1 processes",
        "| versions | parallel_clip 0.1.0, torch 2.9 |",
        "| loss | 2.5 |",
        "| retrieval: image to text recall@1 | 0.25 |",
    ):
        assert words in text, words
    for secret in ("pass", "Signature", "/home", "0.1 |", "transformer_engine"):
        assert secret not in text, secret


def test_phases_and_thawed_towers_are_facts(tmp_path):
    meta = meta_of()
    phases = [{"until": "90%", "resolution": 112, "patch_dropout": 0.5, "lr": None}]
    phases += [{"until": 5000, "resolution": None, "patch_dropout": None, "lr": None}]
    clean = {"shards": "s3://me:pass@bucket/clean/{0..9}.tar?signed", "weight": 2.0}
    phases += [phases[1] | {"until": None, "sources": [clean]}]
    freeze = {"vision": {"unlocked_groups": 1, "norms": False, "unfreeze_at": 4000}, "text": None}
    config = meta.config | {"phases": phases, "freeze": freeze}
    rows = read_training_facts(tmp_path, replace(meta, config=config)).rows
    assert [value for what, value in rows if what == "phase"] == [
        "until 90% of the steps: resolution 112, patch dropout 0.5",
        "until 5,000 pairs: as the model",
        "to the end: `clean/{0..9}.tar` × 2",
    ]
    frozen = "all but the last 1 of its layer groups, until 4,000 pairs"
    assert ("not trained, of the vision tower", frozen) in rows


def test_each_source_of_a_run_is_a_fact_whichever_phase_has_it(tmp_path):
    counted = [{"shards": 3, "samples": 30}, {"shards": 1, "samples": 10}]
    data = {"sources": counted, "shards": ["big/{0..2}.tar", ["clean/0.tar"]]}
    rows = read_training_facts(tmp_path, meta_of(data=data)).rows
    assert [value for what, value in rows if what == "training data"] == [
        "`big/{0..2}.tar`; 3 shards, 30 pairs; 40,000 seen",
        "`clean/0.tar`; 1 shards, 10 pairs; 960 seen",
    ]


def test_a_checkpoint_without_a_run_folder_has_no_figures(tmp_path):
    assert read_training_facts(tmp_path / "step", meta_of()).figures == ()


def test_a_converted_run_was_not_trained_here(tmp_path):
    assert read_training_facts(tmp_path, meta_of(step=0)) is None
    bare = meta_of(config=None, layout=None, versions=None, data=None, source_samples=())
    rows = dict(read_training_facts(tmp_path, bare).rows)
    assert rows.keys() == {
        "optimizer steps", "pairs seen", "pairs replaced, as they could not be read",
    }  # fmt: skip


def test_tables_stay_tables():
    text = card(training=TrainingFacts((("training data", "a|b"),)))
    assert "| training data | a\\|b |" in text


@pytest.mark.parametrize(
    "path, shown",
    [
        ("runs/demo", "runs/demo"),
        ("demo/", "demo"),
        ("/a/b/c.tar", "b/c.tar"),
        ("https://u:p@host/d/{0..9}.tar?sig=1#x", "d/{0..9}.tar"),
        # Nothing that logs in or signs, wherever it stands.
        ("https://u:pass@host/9.tar", "host/9.tar"),
        ("https://pass@host/9.tar", "host/9.tar"),
        ("https://u:pa#s?s@host:80/9.tar", "host:80/9.tar"),
        ("s3://KEY:pa/s/s@bucket/{0..9}.tar", "bucket/{0..9}.tar"),
        ("simplecache::https://u:pass@host/9.tar", "host/9.tar"),
        ("zip://a.tar::https://u:pass@host/9.zip", "host/9.zip"),
        ("https://host/9.tar?sig=1&url=https://u:p@h/x", "host/9.tar"),
        ("https://host/9.tar#sig=1", "host/9.tar"),
        ("s3://bucket/9.tar", "bucket/9.tar"),
        ("hf://datasets/me/name@main/9.tar", "name@main/9.tar"),
    ],
)
def test_a_path_tells_no_more_than_its_end(path, shown):
    assert short_path(path) == shown
