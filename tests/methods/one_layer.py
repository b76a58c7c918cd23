"""One adapted layer whose delta is away from its start."""

import torch
import torch.nn.functional as F
from torch import nn

import graft


def adapted(host: nn.Module, recipe, seed=0, size=0.5) -> tuple:
    """(a model of `host` alone, its delta), all trainable tensors moved at random by `size`."""
    model = nn.Sequential(host)
    adapter = graft.attach(model, recipe, "0", seed=seed)
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(size * torch.randn_like(p))
    return model, adapter.deltas["0"]


def linear(d_in, d_out, bias=True, seed=0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(d_in, d_out, bias, dtype=torch.float64)


def acts_as_its_weight(model: nn.Module, delta, tokens: int) -> None:
    """Output and gradients are those of the dense W', for so many tokens."""
    host = delta.site.module
    x = torch.randn(tokens, host.weight.shape[1], dtype=host.weight.dtype, requires_grad=True)
    y, dense = model(x), F.linear(x, delta.weight(host.weight), host.bias)
    torch.testing.assert_close(y, dense)
    probe, wanted = torch.randn_like(y), [x, *delta.parameters()]
    for a, b in zip(*(torch.autograd.grad(out, wanted, probe) for out in (y, dense))):
        torch.testing.assert_close(a, b)
