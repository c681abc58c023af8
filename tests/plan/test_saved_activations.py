import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from parallel_clip.plan.saved_activations import SavedActivations

ROWS, WIDTH = 10, 64
ONE = ROWS * WIDTH * 4  # bytes of one activation


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(WIDTH, 4 * WIDTH)
        self.second = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        return x + self.second(torch.relu(self.first(x)))


class Stack(nn.Module):
    """Keeps, a layer: its input for `first`, and relu's output, which relu and `second` share."""

    def __init__(self, recompute: bool = False):
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.recompute = recompute

    def forward(self, x):
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.recompute else layer(x)
        return x


@pytest.mark.parametrize("fake", [False, True])
def test_counts_memory_once_and_names_the_part(fake):
    with FakeTensorMode() if fake else torch.enable_grad():
        model, x = Stack(), torch.zeros(ROWS, WIDTH)
        with SavedActivations(model) as saved:
            model(x)
        with SavedActivations(model, excluded=[x[:1]]) as without_input:
            model(x)
    assert saved.by_module == {"layers.first": 2 * ONE, "layers": 2 * 4 * ONE}
    assert saved.total == 10 * ONE
    assert without_input.total == 9 * ONE, "a view stands for all of its memory"


def test_a_view_of_a_parameter_is_no_activation():
    model = nn.Linear(WIDTH, WIDTH, bias=False)
    x = torch.zeros(ROWS, WIDTH, requires_grad=True)
    with SavedActivations(model, excluded=[x]) as saved:
        x @ model.weight.t()
    assert saved.total == 0


def test_memory_freed_before_the_end_is_not_counted():
    model, x = Stack(), torch.zeros(ROWS, WIDTH)
    with SavedActivations(model) as saved:
        model(x).exp().untyped_storage().resize_(0)
    assert saved.total == 10 * ONE


def test_recompute_keeps_the_inputs_of_layers_only():
    model, x = Stack(recompute=True), torch.zeros(ROWS, WIDTH, requires_grad=True)
    with SavedActivations(model) as saved:
        model(x)
    assert saved.by_module == {"": 2 * ONE}
