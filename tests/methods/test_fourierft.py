"""FourierFT against PEFT, and against the sum of cosines that it is."""

import math

import pytest
import torch
from against_peft import both, fill
from hypothesis import given, settings
from hypothesis import strategies as st
from one_layer import acts_as_its_weight, adapted, linear
from peft import FourierFTConfig
from peft_reference import Host
from sizes import largest
from torch import nn
from transformers.pytorch_utils import Conv1D

import graft


@pytest.mark.parametrize("sizes", [(8, 12), (7, 9), (9, 8), (1, 5)])
@pytest.mark.parametrize("layer", [nn.Linear, Conv1D])
def test_is_pefts_fourierft(sizes, layer):
    torch.manual_seed(0)
    host = nn.Linear(*sizes) if layer is nn.Linear else Conv1D(*reversed(sizes))
    count = sizes[0] * sizes[1] // 2
    config = FourierFTConfig(n_frequency=count, scaling=3.0, random_loc_seed=5, fan_in_fan_out=layer is Conv1D)
    ours, delta, theirs = both(host, graft.FourierFT(count=count, scaling=3.0, location_seed=5), config)
    pairs = [(delta.value, theirs.fourierft_spectrum["default"])]
    fill(pairs)
    # PEFT computes the transform itself in float32.
    x = torch.randn(3, 5, sizes[0], dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 99), st.data())
def test_is_a_sum_of_plane_waves(out, width, seed, data):
    count = data.draw(st.integers(1, out * width))
    model = Host(nn.Linear(width, out).double())
    adapter = graft.attach(model, graft.FourierFT(count=count, scaling=2.0, location_seed=seed), "host")
    delta = adapter.deltas["host"]
    with torch.no_grad():
        delta.value.normal_()
    j, k = torch.arange(out)[:, None, None], torch.arange(width)[None, :, None]
    angle = 2 * math.pi * (delta.rows * j.double() / out + delta.columns * k.double() / width)
    waves = 2.0 / (out * width) * (delta.value * angle.cos()).sum(-1)
    x = torch.randn(4, width, dtype=torch.float64)
    torch.testing.assert_close(model(x), x @ (model.host.weight + waves).T + model.host.bias)
    assert len({(int(a), int(b)) for a, b in zip(delta.rows, delta.columns)}) == count


def test_few_entries_make_a_change_of_high_rank():
    model = Host(nn.Linear(32, 32).double())
    delta = graft.attach(model, graft.FourierFT(count=64), "host").deltas["host"]
    with torch.no_grad():
        delta.value.normal_()
    assert torch.linalg.matrix_rank(delta.weight(torch.zeros(32, 32))) > 20  # LoRA of as many numbers: 1
    assert sum(p.numel() for p in delta.parameters()) == 64


def test_no_matrix_of_full_size_is_made_and_only_values_are_stored():
    model = Host(nn.Linear(256, 256))
    adapter = graft.attach(model, graft.FourierFT(count=100), "host")
    x = torch.randn(4, 256)
    assert largest(lambda: model(x).sum().backward()) < 256 * 256
    assert {k: v.numel() for k, v in adapter.state_dict().items()} == {"host:value": 100}


def test_too_many_entries_are_refused():
    with pytest.raises(graft.GraftError, match="count 13 is more than the 12 entries of host's matrix"):
        graft.attach(Host(nn.Linear(3, 4)), graft.FourierFT(count=13), "host")


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 17), st.integers(1, 17), st.sampled_from([1, 300]), st.data())
def test_few_and_many_tokens_meet_the_same_weight(d_in, d_out, tokens, data):
    count = data.draw(st.integers(1, d_in * d_out))
    acts_as_its_weight(*adapted(linear(d_in, d_out), graft.FourierFT(count=count)), tokens)


def test_many_tokens_have_second_derivatives():
    model, delta = adapted(linear(6, 5), graft.FourierFT(count=7))
    x = torch.randn(40, 6, dtype=torch.float64, requires_grad=True)
    first = torch.autograd.grad(model(x).sin().sum(), delta.value, create_graph=True)[0]
    dense = torch.nn.functional.linear(x, delta.weight(delta.site.weight), delta.site.bias)
    expect = torch.autograd.grad(dense.sin().sum(), delta.value, create_graph=True)[0]
    wanted = [x, delta.value]
    for a, b in zip(*(torch.autograd.grad(g.square().sum(), wanted) for g in (first, expect))):
        torch.testing.assert_close(a, b)
