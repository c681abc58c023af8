"""How much memory a conversion takes: it never holds the model.

Peaks are resident memory, which counts pages of mapped files too, in a process of its own, over
that of conversions of a small model; speed does not enter.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

CONVERT = """
import json, resource, sys
from pathlib import Path
import torch
from parallel_clip.convert.open import convert_checkpoint
from parallel_clip.convert.streamed_safetensors import TensorSpec, write_safetensors
from parallel_clip.model.architecture import parameter_table
from parallel_clip.model.openclip_json import architecture_from_json

torch.set_num_threads(1)
models, conversions = json.loads(sys.argv[1])
for folder, model in models.items():
    folder = Path(folder)
    folder.mkdir(exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model}))
    table = parameter_table(architecture_from_json(model, "m"))
    specs = {p.name: TensorSpec(torch.float32, p.shape) for p in table}
    tensors = (torch.zeros(spec.shape) for spec in specs.values())
    write_safetensors(folder / "open_clip_model.safetensors", specs, tensors)
peaks = {}
for source, target, to, *mix in conversions:
    convert_checkpoint(source, target, to, mix=[(other, 0.3) for other in mix])
    peaks[target] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps(peaks))
"""

PICKLE = """
import sys, torch
from safetensors.torch import load_file
torch.save(load_file(sys.argv[1] + "/open_clip_model.safetensors"), sys.argv[1] + "/model.bin")
"""


def model(width: int, layers: int) -> dict:
    text = {"context_length": 16, "vocab_size": 1000, "width": width, "heads": 8, "layers": layers}
    vision = {"image_size": 32, "patch_size": 8, "width": width, "layers": layers}
    return {"embed_dim": width, "vision_cfg": vision, "text_cfg": text}


def run(script: str, argument: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, argument]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def peaks_over_small(folder: Path, models: dict, conversions: list) -> dict[str, float]:
    """Megabytes by which each conversion is above those of a small model."""
    small = [["small", f"small_{to}", to] for to in ("huggingface", "run", "openclip")]
    steps = [
        [str(folder / s), str(folder / t), to, *(str(folder / other) for other in mix)]
        for s, t, to, *mix in [*small, *conversions]
    ]
    models = {str(folder / name): made for name, made in models.items()}
    peaks = json.loads(run(CONVERT, json.dumps([models, steps])))
    peaks = {Path(target).name: peak for target, peak in peaks.items()}
    base = max(peak for name, peak in peaks.items() if name.startswith("small"))
    return {target: (peaks[target] - base) / 1e6 for _, target, *_ in conversions}


def test_a_conversion_holds_a_few_tensors(tmp_path):
    """A model of 213 MB; the largest tensors have 9.4 MB. A mean holds one more."""
    models = {"small": model(64, 1), "large": model(768, 4)}
    # A peak is that of all conversions so far: those that take little come first.
    conversions = [("large", "hf", "huggingface"), ("hf", "mixed", "openclip", "large", "hf")]
    conversions += [("hf", "run", "run"), ("run", "o", "openclip")]
    more = peaks_over_small(tmp_path, models, conversions)
    assert (tmp_path / "large/open_clip_model.safetensors").stat().st_size > 200e6
    # A run is written in files of 32 MiB, of which one is collected while another is written.
    assert more["hf"] < 70 and more["mixed"] < 80 and max(more.values()) < 130, more


@pytest.mark.long
def test_a_pickled_file_is_not_held(tmp_path):
    """64 MiB of it stay mapped."""
    peaks_over_small(tmp_path, {"small": model(64, 1), "large": model(768, 4)}, [])
    run(PICKLE, str(tmp_path / "large"))
    (tmp_path / "large/open_clip_model.safetensors").unlink()
    for name in ("huggingface", "run", "openclip"):
        (tmp_path / f"small_{name}").rename(tmp_path / f"before_{name}")
    more = peaks_over_small(tmp_path, {}, [("large", "hf", "huggingface")])
    assert more["hf"] < 150, more
