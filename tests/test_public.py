"""What Python users import: it is there, has docstrings, and leaves the process as it was."""

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image

import parallel_clip
from parallel_clip.engine.groups import Groups
from parallel_clip.layout import Layout
from tests import reference
from tests.small_models import image_batch, small_model, token_batch

MODEL = small_model(text={"vocab_size": 49408, "context_length": 16})


@pytest.mark.parametrize("name", parallel_clip.__all__)
def test_what_is_public_is_there_and_described(name):
    value = getattr(parallel_clip, name)
    assert inspect.getdoc(value) and value.__module__.startswith("parallel_clip.")


def test_what_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'load_model'"):
        parallel_clip.load_model  # noqa: B018


def beside_another_model(groups: Groups, folder: Path) -> None:
    """Two checkpoints, OpenCLIP's model between them, and conversions: equal features, and neither
    the random numbers nor the default type of the process change."""
    inputs = image_batch(MODEL, 2), token_batch(MODEL, 2)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    encoders, theirs = [], []
    for seed in (1, 2):
        source = folder / f"{seed}"
        weights = reference.make_checkpoint(MODEL, seed=seed, folder=source)
        torch.set_rng_state(state)
        encoders.append(parallel_clip.load_encoder(source))
        parallel_clip.convert_checkpoint(source, folder / f"run{seed}", "run")
        assert torch.equal(torch.get_rng_state(), state)
        model = reference.build_model(MODEL).eval()
        model.load_state_dict(weights)
        theirs.append(model)
    encoders.append(parallel_clip.load_encoder(folder / "run2"))
    theirs.append(theirs[-1])
    assert torch.get_default_dtype() == torch.float32
    for encoder, model in zip(encoders, theirs, strict=True):
        with torch.no_grad():
            images, texts, _ = model(*inputs)
        assert torch.allclose(encoder.encode_image(inputs[0]), images, atol=1e-5)
        assert torch.allclose(encoder.encode_text(inputs[1]), texts, atol=1e-5)
    with pytest.raises(parallel_clip.InputError, match="does not exist"):
        parallel_clip.load_encoder(folder / "nowhere")


@pytest.mark.parametrize("layout", [Layout(1), Layout(2)], ids=["alone", "in a world of two"])
def test_encoders_beside_another_model_again_and_again(processes, tmp_path, layout):
    processes.run(layout, in_own_folder, folder=tmp_path)


def in_own_folder(groups: Groups, folder: Path) -> None:
    own = folder / f"rank {groups.rank}"
    own.mkdir()
    beside_another_model(groups, own)


def pictures_and_captions(groups: Groups, folder: Path) -> None:
    encoder = parallel_clip.load_encoder(folder / "x")
    _, _, theirs = open_clip.create_model_and_transforms(f"local-dir:{folder}/x")
    picture = Image.effect_mandelbrot((50, 40), (-2, -1, 1, 1), 20).convert("RGB")
    ours = parallel_clip.evaluation_transform(encoder.preprocess)(picture)
    assert torch.equal(ours, theirs(picture))
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}/x")(["a photo"])
    assert torch.equal(encoder.tokenizer(["a photo"]), tokens)


def test_pictures_and_captions_as_open_clip_prepares_them(processes, tmp_path):
    reference.make_checkpoint(MODEL, seed=1, folder=tmp_path / "x")
    processes.run(Layout(1), pictures_and_captions, folder=tmp_path)


def test_the_example_of_the_documentation(tmp_path):
    page = Path(__file__).parents[1].joinpath("docs/python.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", page, re.DOTALL)[1]
    reference.make_checkpoint(MODEL, seed=1, folder=tmp_path / "runs/demo")
    Image.new("RGB", (40, 50)).save(tmp_path / "cat.png")
    ended = subprocess.run(
        [sys.executable, "-c", f"{code}\nprint(list(similarity.shape))"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
    )
    assert (ended.returncode, ended.stdout) == (0, "[1, 2]\n"), ended.stderr
