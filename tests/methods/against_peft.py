"""The same layer adapted by Graft and by Hugging Face PEFT, in float64."""

import copy

import peft
import torch
from torch import nn

import graft


class One(nn.Module):
    """A model of one layer, which both libraries find under the name "host"."""

    def __init__(self, host):
        super().__init__()
        self.host = host

    def forward(self, x):
        return self.host(x)


def both(host: nn.Module, recipe, config) -> tuple:
    """(our model, its delta, PEFT's model, PEFT's layer) on copies of `host`."""
    ours, theirs = One(copy.deepcopy(host)).double(), One(copy.deepcopy(host)).double()
    adapter = graft.attach(ours, recipe, "host")
    theirs = peft.get_peft_model(theirs, config, autocast_adapter_dtype=False).double()
    return ours, adapter.deltas["host"], theirs, theirs.base_model.model.host


def fill(pairs, scale=0.3) -> None:
    """Write the same random numbers into each (our tensor, PEFT's tensor); PEFT's may be in another shape."""
    torch.manual_seed(1)
    with torch.no_grad():
        for mine, other in pairs:
            mine.copy_(scale * torch.randn_like(mine))
            other.copy_(mine.reshape(other.shape))


def same(ours, theirs, pairs, x) -> None:
    """Equal outputs, and equal gradients in every pair of tensors."""
    mine, other = ours(x), theirs(x)
    torch.testing.assert_close(mine, other)
    left = torch.autograd.grad(mine.sin().sum(), [a for a, _ in pairs])
    right = torch.autograd.grad(other.sin().sum(), [b for _, b in pairs])
    for a, b in zip(left, right):
        torch.testing.assert_close(a, b.reshape(a.shape))
