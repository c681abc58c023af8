"""Small tokenizers in folders as Hugging Face has them."""

import json
import string
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors

from tests.data.samples.sentencepiece_models import gemma_like, t5_like

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *string.ascii_lowercase]
VOCABULARY += ["##" + letter for letter in string.ascii_lowercase] + ["dog", "photo", "\u72ac"]


def make_bert(folder: Path) -> Path:
    """As bert-base-uncased has it: the vocabulary alone."""
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n", "utf-8")
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    return folder


def make_unigram(folder: Path) -> Path:
    """As T5's: tokenizer.json with its end token, padding named in the settings."""
    folder.mkdir(exist_ok=True)
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -3.0)]
    pieces += [(letter, -4.0) for letter in string.ascii_letters + "\u2581"]
    pieces += [("\u2581dog", -1.0), ("photo", -1.0)]
    model = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=2))
    model.normalizer = normalizers.NFKC()
    model.pre_tokenizer = pre_tokenizers.Metaspace()
    model.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    model.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": {"content": "<pad>"}}))
    return folder


def make_folder(
    folder: Path,
    files: dict[str, bytes],
    settings: dict[str, Any] | None = None,
    model_type: str | None = None,
) -> Path:
    """A folder with these files, tokenizer_config.json of `settings` and config.json of a model."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    if settings is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if model_type is not None:
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


def make_spiece(folder: Path) -> Path:
    """A SentencePiece model as SigLIP's, which nothing describes."""
    return make_folder(folder, {"spiece.model": t5_like()})


def make_gemma(folder: Path) -> Path:
    """A SentencePiece model as SigLIP 2's, which nothing describes."""
    return make_folder(folder, {"tokenizer.model": gemma_like()})
