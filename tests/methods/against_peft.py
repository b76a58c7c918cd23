"""The same layer adapted by Graft and by Hugging Face PEFT, in float64, with the same tensors."""

import copy

import torch
from peft_reference import Host, peft_layer
from torch import nn

import graft


def both(host: nn.Module, recipe, config) -> tuple:
    """(our model, its delta, PEFT's layer) on copies of `host` in float64."""
    ours = Host(copy.deepcopy(host)).double()
    return ours, graft.attach(ours, recipe, "host").deltas["host"], peft_layer(host.double(), config)


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
