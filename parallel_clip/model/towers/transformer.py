"""What the transformer towers share: their shape, parameters, costs and initial values."""

from typing import Literal

Activation = Literal["gelu", "gelu_tanh", "quick_gelu"]
