"""How much memory a conversion takes: it never holds the model.

Peaks are resident memory, which counts pages of mapped files too, in a process of its own, over
that of a conversion of a small model; speed does not enter.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

CONVERT = """
import json, resource, sys
import torch
from parallel_clip.convert.open import convert_checkpoint

torch.set_num_threads(1)
peaks = {}
for source, target, to, options in json.loads(sys.argv[1]):
    convert_checkpoint(source, target, to, **options)
    peaks[target] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps(peaks))
"""

WRITE = """
import json, sys
import torch
from pathlib import Path
from parallel_clip.convert.streamed_safetensors import TensorSpec, write_safetensors
from parallel_clip.model.architecture import parameter_table
from parallel_clip.model.openclip_json import architecture_from_json

for folder, model, pickled in json.loads(sys.argv[1]):
    folder = Path(folder)
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model}))
    table = parameter_table(architecture_from_json(model, "m"))
    specs = {p.name: TensorSpec(torch.float32, p.shape) for p in table}
    print(sum(spec.bytes for spec in specs.values()))
    if pickled:
        state = {name: torch.zeros(spec.shape) for name, spec in specs.items()}
        torch.save(state, folder / "open_clip_pytorch_model.bin")
    else:
        tensors = (torch.zeros(spec.shape) for spec in specs.values())
        write_safetensors(folder / "open_clip_model.safetensors", specs, tensors)
"""


def model(width: int, layers: int) -> dict:
    text = {"context_length": 16, "vocab_size": 1000, "width": width, "heads": 8, "layers": layers}
    vision = {"image_size": 32, "patch_size": 8, "width": width, "layers": layers}
    return {"embed_dim": width, "vision_cfg": vision, "text_cfg": text}


def run(script: str, arguments: list) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(arguments)],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_conversion_holds_a_few_tensors(tmp_path):
    """200 MB in tensors of at most 9.4 MB."""
    sizes = run(
        WRITE,
        [
            [str(tmp_path / "small"), model(64, 1), False],
            [str(tmp_path / "large"), model(768, 4), False],
            [str(tmp_path / "pickled"), model(768, 4), True],
        ],
    ).split()
    assert int(sizes[1]) > 200e6
    steps = [
        ("small", "small_openclip", "openclip", {}),
        ("small", "small_run", "run", {}),
        ("large", "openclip", "openclip", {"precision": "bf16"}),
        ("large", "run", "run", {}),
        ("run", "back", "openclip", {}),
        ("pickled", "unpickled", "openclip", {}),
    ]
    steps = [(str(tmp_path / s), str(tmp_path / t), to, o) for s, t, to, o in steps]
    peaks = json.loads(run(CONVERT, steps))
    base = peaks[str(tmp_path / "small_run")]
    more = {Path(target).name: (peak - base) / 1e6 for target, peak in peaks.items()}
    # Beside two tensors: what is copied at once; for a run the files of 32 MiB that are collected
    # and written; of a pickled file 64 MiB that stay mapped.
    assert more["openclip"] < 60, more
    assert max(more["run"], more["back"]) < 130, more
    assert more["unpickled"] < 180, more
