"""Linearised fine-tuning: the Taylor expansion of the host, affine in what is trained, in transformers too."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call

import graft
from models import bert, llama, tokens


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 4)

    def forward(self, x):
        return self.down(torch.tanh(self.norm(self.up(x))))


def host():
    torch.manual_seed(0)
    return nn.Sequential(MLP().double(), nn.Linear(4, 2).double())


def attached(model, target, seed, size=0.3):
    model = copy.deepcopy(model)
    adapter = graft.attach(model, graft.Tangent(), target)
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in adapter.parameters():
            p.copy_(size * torch.randn_like(p))
    return model, adapter


def test_is_the_first_order_expansion():
    base, x = host(), torch.randn(3, 5, dtype=torch.float64)
    model, adapter = attached(base, "0", 1)
    delta = adapter.deltas["0"]
    own = dict(base[0].named_parameters())
    step = 1e-6
    moved = lambda sign: functional_call(
        base[0], {n: p + sign * step * d for (n, p), d in zip(own.items(), delta.d)}, x
    )
    expect = base[0](x) + (moved(1) - moved(-1)) / (2 * step)
    torch.testing.assert_close(model[0](x), expect, rtol=1e-6, atol=1e-8)
    ordinary = functional_call(base[0], {n: p + d for (n, p), d in zip(own.items(), delta.d)}, x)
    assert (ordinary - expect).abs().max() > 0.1


def test_the_gradient_is_that_of_an_affine_function():
    base, x = host(), torch.randn(3, 5, dtype=torch.float64)
    model, adapter = attached(base, "0", 1)
    delta = adapter.deltas["0"]
    probe = torch.randn(3, 4, dtype=torch.float64)
    ours = torch.autograd.grad((model[0](x) * probe).sum(), [*delta.d])
    theirs = torch.autograd.grad((base[0](x) * probe).sum(), [*base[0].parameters()])
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b)


def test_averages_of_adapters_are_ensembles_and_a_part_can_be_removed():
    base, x = host(), torch.randn(3, 5, dtype=torch.float64)
    shards = [attached(base, "0", seed) for seed in (1, 2, 3)]
    outputs = torch.stack([model[0](x) for model, _ in shards])
    whole, adapter = attached(base, "0", 0)
    mean = [sum(ds) / 3 for ds in zip(*(a.parameters() for _, a in shards))]
    with torch.no_grad():
        for p, m in zip(adapter.parameters(), mean):
            p.copy_(m)
        torch.testing.assert_close(whole[0](x), outputs.mean(0))
        for p, gone in zip(adapter.parameters(), shards[2][1].parameters()):
            p.copy_((3 * p - gone) / 2)
        torch.testing.assert_close(whole[0](x), outputs[:2].mean(0))


@pytest.mark.parametrize("make, target, path", [(llama, "model", ""), (bert, "bert", "bert")])
def test_transformers_are_linearised_with_their_attention(make, target, path):
    base, outputs = make(), []
    for size in (0.0, 0.01, 0.02):
        model, adapter = attached(base, target, 1, size)
        out = model.get_submodule(path)(tokens())
        sum(t.sum() for t in out.values() if isinstance(t, torch.Tensor)).backward()
        assert all(p.grad is not None for p in adapter.parameters())
        outputs.append(out[0].detach())
    torch.testing.assert_close(outputs[2] - outputs[1], outputs[1] - outputs[0], rtol=1e-3, atol=1e-5)
    assert (outputs[1] - outputs[0]).abs().max() > 1e-3


def test_deltas_below_it_stay_as_they_are():
    base, x = host(), torch.randn(3, 5, dtype=torch.float64)
    alone, adapter = attached(base, "0", 1)
    model = copy.deepcopy(base)
    full = graft.attach(model, "full", "0", name="full")
    both = graft.attach(model, graft.Tangent(), "0")
    with torch.no_grad():
        for p in full.parameters():
            p.add_(0.3 * torch.randn_like(p))
        with both.disabled():
            below = model[0](x)
        for p, q in zip(both.parameters(), adapter.parameters()):
            p.copy_(q)
        torch.testing.assert_close(model[0](x) - below, alone[0](x) - base[0](x))
