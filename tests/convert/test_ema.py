"""Averages of weights as a source: in place of the weights, and only where there are some."""

from dataclasses import replace

import pytest
import torch

from parallel_clip.checkpoint import commit
from parallel_clip.checkpoint.manifest import Manifest
from parallel_clip.checkpoint.meta import META_FILE, Meta
from parallel_clip.checkpoint.pieces import INDEX_FILE, Piece, write_index, write_pieces
from parallel_clip.config import config_from_dict
from parallel_clip.convert.open import convert_checkpoint, open_source
from parallel_clip.data.samples.transforms import Preprocess
from parallel_clip.errors import InputError
from parallel_clip.evaluate.encoder import load_encoder
from parallel_clip.model.openclip_json import architecture_from_json
from tests import reference
from tests.small_models import image_batch, small_model

MODEL = small_model(text={"vocab_size": 49408})  # for which CLIP's tokenizer is
WEIGHTS, AVERAGES = (reference.random_weights(MODEL, seed=seed) for seed in (1, 2))
NOT_TRAINED = "visual.conv1.weight"


def trained_run(folder, averages=AVERAGES):
    """A run folder with a checkpoint of step 3; a tensor of it was not trained."""
    config = {"train": {"steps": 9}, "data": {"train": [{"shards": "a.tar"}]}}
    if averages:
        config["ema"] = {"decay": 0.9, "every": 2}
    meta = Meta.of_model(
        architecture_from_json(MODEL, "small"), Preprocess((32, 32)).to_openclip(), None
    )
    meta = replace(
        meta, step=3, updates=3, has_moments=False, has_averages=bool(averages),
        config=config_from_dict(config).to_record(),
    )  # fmt: skip
    tensors = {f"weight:{name}": tensor for name, tensor in WEIGHTS.items()}
    tensors |= {f"ema:{name}": tensor for name, tensor in averages.items() if name != NOT_TRAINED}
    folder.mkdir()
    unfinished = commit.begin(folder, 3)
    pieces = (Piece(key, tensor, tuple(tensor.shape)) for key, tensor in tensors.items())
    entries, files = write_pieces(unfinished, 0, pieces)
    files |= {INDEX_FILE: write_index(unfinished, entries), META_FILE: meta.write(unfinished)}
    Manifest(files).write(unfinished)
    commit.commit(unfinished, 3)
    return folder


EXPECTED = AVERAGES | {NOT_TRAINED: WEIGHTS[NOT_TRAINED]}


def test_averages_are_taken_where_they_are_asked_for(tmp_path):
    run = trained_run(tmp_path / "run")
    for averages, expected in ((False, WEIGHTS), (True, EXPECTED)):
        source = open_source(run, averages=averages)
        assert source.metadata.has_averages and source.shapes().keys() == WEIGHTS.keys()
        assert all(torch.equal(source.read(name), expected[name]) for name in expected)


@pytest.mark.parametrize("to", ["openclip", "run"])
def test_averages_are_converted(tmp_path, to):
    run = trained_run(tmp_path / "run")
    convert_checkpoint(run, tmp_path / "to", to, ema=True)
    source = open_source(tmp_path / "to")
    assert all(torch.equal(source.read(name), EXPECTED[name]) for name in EXPECTED)
    assert not source.metadata.has_averages


def test_an_encoder_of_averages_is_open_clips(tmp_path):
    model = reference.build_model(MODEL).eval()
    model.load_state_dict(EXPECTED)
    images = image_batch(MODEL, 3)
    with torch.no_grad():
        expected = torch.nn.functional.normalize(model.encode_image(images), dim=-1)
    encoder = load_encoder(trained_run(tmp_path / "run"), ema=True)
    assert torch.allclose(encoder.encode_image(images), expected, atol=1e-5)


def test_what_has_no_averages_says_so_and_nothing_is_written(tmp_path):
    run = trained_run(tmp_path / "run", averages={})
    convert_checkpoint(run, tmp_path / "openclip", "openclip")
    file = tmp_path / "openclip/open_clip_model.safetensors"
    for source in (run, tmp_path / "openclip", file):
        with pytest.raises(InputError, match="no averages of weights.* ema.decay.*leave --ema out"):
            convert_checkpoint(source, tmp_path / "to", "openclip", ema=True)
        with pytest.raises(InputError, match="no averages of weights"):
            load_encoder(source, ema=True)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["openclip", "run"]


def test_in_a_mean_those_that_have_averages_give_them(tmp_path):
    run = trained_run(tmp_path / "run")
    other = reference.make_checkpoint(MODEL, seed=3, folder=tmp_path / "other")
    mix = [(tmp_path / "other", 0.25), (run, 0.25)]
    said = convert_checkpoint(run, tmp_path / "to", "openclip", ema=True, mix=mix)
    found = reference.load_weights(tmp_path / "to")
    for name in other:
        expected = 0.75 * EXPECTED[name] + 0.25 * other[name]
        assert torch.allclose(found[name], expected, rtol=1e-6, atol=1e-7), name
    (line,) = [line for line in said if line.startswith("mean of weights")]
    assert f"0.5 of {run}, its averages; 0.25 of {tmp_path}/other; 0.25 of {run}, its" in line
    card = (tmp_path / "to/README.md").read_text()
    assert "run, step 3, averages | 0.5 |" in card and "/other | 0.25 |" in card


def test_the_card_says_what_they_are_and_has_their_own_figures(tmp_path):
    run = trained_run(tmp_path / "run")
    lines = ['{"step": 3, "loss": 1.5}', '{"step": 3, "ema": true, "loss": 2.5}']
    (run / "evaluations.jsonl").write_text("\n".join(lines) + "\n")
    for ema, own, others in ((False, "1.5", "2.5"), (True, "2.5", "1.5")):
        convert_checkpoint(run, tmp_path / f"{ema}", "openclip", ema=ema)
        card = (tmp_path / f"{ema}/README.md").read_text()
        assert f"| loss | {own} |" in card and f"| loss | {others} |" not in card
        average = "| weights | exponential moving average of decay 0.9, 2 optimizer steps apart |"
        assert (average in card) == ema
    (run / "evaluations.jsonl").write_text(lines[1] + "\n")
    convert_checkpoint(run, tmp_path / "none", "openclip")
    assert "Evaluated" not in (tmp_path / "none/README.md").read_text()
