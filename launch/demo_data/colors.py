"""The colours of a picture in plain words, for captions that say what is to be seen."""

import numpy as np
from PIL import Image

# Upper end of each hue in degrees; above the last it is red again.
HUES = [(14, "red"), (36, "orange"), (68, "yellow"), (160, "green"), (190, "teal"),
        (246, "blue"), (292, "purple"), (345, "pink"), (360, "red")]  # fmt: skip
NAMES = ["black", "white", "gray", "brown", *dict.fromkeys(name for _, name in HUES)]

LEAST_SHARE = 0.15  # of the drawn pixels, for a second colour to be named


def main_colors(drawn: Image.Image) -> str:
    """The one or two colours that cover most of an RGBA picture, such as "gray and pink"."""
    hue, saturation, value = np.moveaxis(np.asarray(drawn.convert("RGB").convert("HSV")), 2, 0)
    names = np.array([name for _, name in HUES])[
        np.searchsorted([end for end, _ in HUES], hue * (360 / 256))
    ]
    warm = np.isin(names, ["red", "orange", "yellow"])
    names = np.where((names == "red") & (saturation < 120) & (value > 180), "pink", names)
    names = np.where(warm & (value < 165) & (saturation > 60), "brown", names)
    names = np.where(saturation < 45, np.where(value > 210, "white", "gray"), names)
    names = np.where(value < 70, "black", names)

    opaque = np.asarray(drawn.getchannel("A")) > 127
    shares = {name: np.mean(names[opaque] == name) for name in NAMES}
    first, second = sorted(NAMES, key=shares.__getitem__, reverse=True)[:2]
    return f"{first} and {second}" if shares[second] >= LEAST_SHARE else first
