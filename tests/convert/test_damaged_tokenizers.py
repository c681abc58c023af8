"""Tokenizers that are damaged: each conversion ends with their name, and nothing is written."""

import json
from functools import partial

import pytest

from parallel_clip.convert.open import convert_checkpoint
from parallel_clip.data.samples import sentencepiece_model
from parallel_clip.errors import InputError
from tests import reference
from tests.data.samples.sentencepiece_models import t5_like
from tests.data.samples.tokenizer_folders import make_unigram
from tests.small_models import small_model

CONFIG, TOKENIZER = "tokenizer_config.json", "tokenizer.json"


def written(name, content, folder):
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def cut(name, folder):
    written(name, (folder / name).read_bytes()[:-20], folder)


def as_a_folder(name, folder):
    (folder / name).unlink()
    (folder / name).mkdir()


def settings(folder, **values):
    written(CONFIG, json.dumps({"pad_token": "<pad>"} | values), folder)


def with_json(folder, **values):
    content = json.loads((folder / TOKENIZER).read_text())
    written(TOKENIZER, json.dumps(content | values), folder)


def with_spiece(folder, content=b"garbage", **values):
    (folder / TOKENIZER).unlink()
    written("spiece.model", content, folder)
    settings(folder, tokenizer_class="SiglipTokenizer", **values)


SPLIT = {"type": "TemplateProcessing", "pair": [], "special_tokens": {},
         "single": [{"SpecialToken": {"id": "x", "type_id": 0}}]}  # fmt: skip

# What is said of each.
DAMAGES = {
    "cut": (partial(cut, TOKENIZER), "cannot be read"),
    "cut settings": (partial(cut, CONFIG), "tokenizer_config.json cannot be read as JSON"),
    "no model": (partial(written, TOKENIZER, '{"model": {}}'), "cannot be read"),
    "a list": (partial(written, TOKENIZER, "[]"), "cannot be read"),
    "deep": (partial(written, TOKENIZER, "[" * 100_000), "cannot be read"),
    "a list of settings": (partial(written, CONFIG, "[]"), "it holds a list, not an object"),
    "deep settings": (partial(written, CONFIG, "[" * 100_000), "nested more than 100 deep"),
    "a list of roles": (
        partial(written, "special_tokens_map.json", "[1]"),
        "special_tokens_map.json cannot be read",
    ),
    "a folder of settings": (partial(as_a_folder, CONFIG), "tokenizer_config.json cannot be read"),
    "a class": (partial(settings, tokenizer_class=5), "tokenizer_class must be a text, not 5"),
    "padding": (partial(settings, pad_token=5), "pad_token must be a text, not 5"),
    "an end": (partial(settings, eos_token={"content": [1]}), "eos_token must be a text"),
    "a side": (partial(settings, padding_side=["left"]), "padding_side must be left or right"),
    "a cut": (partial(settings, truncation_side="up"), "truncation_side must be left or right"),
    "sentinels": (
        partial(settings, tokenizer_class="T5Tokenizer", extra_ids="x"),
        "source cannot be read",
    ),
    # These two make the library panic.
    "a map": (
        partial(with_json, normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
        "source cannot be read",
    ),
    "an end unknown": (partial(with_json, post_processor=SPLIT), "source cannot be read"),
    "no pieces": (with_spiece, "spiece.model .* is no SentencePiece model"),
    "lists of tokens": (
        partial(with_spiece, content=t5_like(), added_tokens_decoder=[1]),
        "source cannot be read",
    ),
    "tokens without text": (
        partial(with_spiece, content=t5_like(), added_tokens_decoder={"1": {"id": 1}}),
        "source cannot be read",
    ),
}


@pytest.fixture
def source(tmp_path):
    text = {"vocab_size": 300, "hf_tokenizer_name": "some/name"}
    clean = {"tokenizer_kwargs": {"clean": "canonicalize"}}
    reference.make_checkpoint(small_model(text=text | clean), seed=1, folder=tmp_path / "source")
    return make_unigram(tmp_path / "source")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_tokenizer_is_named_and_nothing_written(tmp_path, source, damage):
    spoil, told = DAMAGES[damage]
    spoil(source)
    before = sorted(tmp_path.rglob("*"))
    for to in ("openclip", "huggingface", "run"):
        with pytest.raises(InputError, match=told):
            convert_checkpoint(source, tmp_path / "target", to)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("clean", ["upper", 5, None, ["lower"], {"a": 1}])
def test_a_cleaning_that_there_is_not_is_named(tmp_path, source, clean):
    config = json.loads((source / "open_clip_config.json").read_text())
    for name in (None, "some/name"):  # CLIP's own, and that of the folder
        config["model_cfg"]["text_cfg"] |= {"tokenizer_kwargs": {"clean": clean}}
        config["model_cfg"]["text_cfg"] |= {"hf_tokenizer_name": name}
        (source / "open_clip_config.json").write_text(json.dumps(config))
        for to in ("openclip", "huggingface", "run"):
            with pytest.raises(InputError, match="clean of the model is .*expected one of lower"):
                convert_checkpoint(source, tmp_path / "target", to)
    assert not (tmp_path / "target").exists()


def test_a_model_of_sentencepiece_travels_without_its_library(tmp_path, source, monkeypatch):
    with_spiece(source, content=t5_like())

    def missing(self, file):
        raise sentencepiece_model.MissingLibraryError(str(file))

    monkeypatch.setattr(sentencepiece_model.SentencePieceModel, "__init__", missing)
    convert_checkpoint(source, tmp_path / "target", "openclip")
    assert (tmp_path / "target/spiece.model").read_bytes() == t5_like()
