"""MiSS: folding the input is repeating the shard, also where the rank does not divide; PEFT's layer."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft_reference import peft_layer
from torch import nn

import graft


def adapted(host, seed=0, **hyper):
    model = nn.Sequential(host)
    adapter = graft.attach(model, graft.MiSS(**hyper), "0")
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in adapter.parameters():
            p.normal_()
    return model, adapter.deltas["0"]


@settings(max_examples=25, deadline=None)
@given(d_in=st.integers(1, 12), d_out=st.integers(1, 9), rank=st.integers(1, 14), seed=st.integers(0, 99))
def test_every_input_uses_the_row_of_its_remainder(d_in, d_out, rank, seed):
    host = nn.Linear(d_in, d_out, dtype=torch.float64)
    model, delta = adapted(host, seed, rank=rank)
    update = torch.stack([delta.D[i % rank] for i in range(d_in)], dim=1)
    x = torch.randn(4, d_in, dtype=torch.float64)
    torch.testing.assert_close(model(x), x @ (host.weight + update).T + host.bias)
    torch.testing.assert_close(delta.weight(host.weight), host.weight + update)


@pytest.mark.parametrize("rank", [4, 3])
def test_equals_peft(rank):
    peft = pytest.importorskip("peft")
    host = nn.Linear(8, 12).double()
    reference = peft_layer(host, peft.MissConfig(r=rank, init_weights=True))
    model, delta = adapted(host, rank=rank)
    with torch.no_grad():
        reference.miss_block["default"].copy_(delta.D)
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(model(x), reference(x))


def test_dropout_falls_on_the_update_alone_and_only_in_training():
    host = nn.Linear(8, 4, dtype=torch.float64)
    model, delta = adapted(host, rank=2, dropout=0.5)
    x = torch.ones(2000, 8, dtype=torch.float64)
    exact = model.eval()(x)
    torch.testing.assert_close(exact, nn.functional.linear(x, delta.weight(host.weight), host.bias))
    dropped = model.train()(x)
    assert not torch.equal(dropped, exact)
    base = nn.functional.linear(x, host.weight, host.bias)
    # An unbiased estimate of the update: 2000 rows, each input's standard deviation is that of its own product.
    spread = 2 * (8 * delta.D.square().sum(0) / 2).sqrt() / 2000**0.5
    assert ((dropped - exact).mean(0).abs() < 4 * spread).all()
    assert ((dropped - base).abs().sum(1) > 0).float().mean() > 0.9
