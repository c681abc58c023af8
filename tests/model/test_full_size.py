"""One model of each family at its full size, with open_clip's random weights, against open_clip:
features in fp32, on one rank and on two with sequence parallelism."""

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from parallel_clip.layout import Layout
from tests.model.clip_cases import features_of_file
from tests.small_models import distance

PAIRS = 2
FULL_SIZE = [
    "ViT-L-14-quickgelu",
    "ViT-L-14-CLIPA",
    "ViT-L-14-worldwide",
    "ViT-SO400M-14-SigLIP-384",
    "ViT-SO400M-16-SigLIP2-256",
    "ViT-SO400M-16-SigLIP-i18n-256",
    "PE-Core-L-14-336",
    "PE-Core-T-16-384",
    "MobileCLIP2-L-14",
]


@pytest.mark.long
@pytest.mark.parametrize("name", FULL_SIZE)
def test_features_are_open_clips(processes, tmp_path, name):
    torch.manual_seed(0)
    model = open_clip.create_model(name, load_weights=False).eval()
    text = open_clip.get_model_config(name)["text_cfg"]
    size = open_clip.get_model_config(name)["vision_cfg"]["image_size"]
    images = torch.randn(PAIRS, 3, size, size)
    tokens = torch.randint(3, 30_000, (PAIRS, text["context_length"]))
    tokens[:, -2] = text.get("eos_id", 2)
    with torch.no_grad():
        expected = torch.stack(model(images, tokens)[:2])
    file = tmp_path / "open_clip_model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, file)
    del model
    layouts = [Layout(1), Layout(2, tensor=2, sequence=True)]
    for layout in layouts[: 1 if name == "PE-Core-T-16-384" else 2]:  # whose picture has 3 heads
        inputs = {"weights": file, "images": images, "tokens": tokens}
        for ours in processes.run(layout, features_of_file, model_name=name, **inputs):
            assert distance(ours[0], expected[0]) < 1e-5
            assert distance(ours[1], expected[1]) < 1e-5
