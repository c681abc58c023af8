"""Pictures that travel as bytes are on the device what the transforms make of them on the CPU."""

import pytest
import torch
from PIL import Image

from parallel_clip.data.samples.transforms import Preprocess, evaluation_transform, normalize

pytestmark = pytest.mark.gpu

SETTINGS = {
    "openai": Preprocess((16, 16)),
    "halves": Preprocess((16, 16), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
    "others": Preprocess((16, 16), mean=(0.45, 0.5, 0.4), std=(0.3, 0.25, 0.28)),
}


@pytest.mark.parametrize("preprocess", SETTINGS.values(), ids=SETTINGS.keys())
def test_normalising_on_the_device_gives_the_bits_of_the_transform(groups, preprocess):
    values = bytes(range(256))
    picture = Image.merge("RGB", [Image.frombytes("L", (16, 16), values)] * 3)  # every value
    wanted = evaluation_transform(preprocess)(picture)
    pixels = evaluation_transform(preprocess, normalized=False)(picture)
    found = normalize(pixels.to(groups.device), preprocess).cpu()
    differing = int((found != wanted).sum())
    assert torch.equal(found, wanted), f"{differing} of {wanted.numel()} numbers differ"
