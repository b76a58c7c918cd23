"""WaveFT against PEFT, and the wavelets it is made of."""

import pytest
import torch
from against_peft import both, fill, same
from hypothesis import given, settings
from hypothesis import strategies as st
from one_layer import acts_as_its_weight, adapted, linear
from peft import WaveFTConfig
from peft.tuners.waveft.wavelet import Wavelet
from peft_reference import Host
from sizes import largest
from torch import nn
from transformers.pytorch_utils import Conv1D

import graft
from graft.methods.weight.waveft import analysed, coefficients, daubechies, synthesised


@pytest.mark.parametrize("moments", range(1, 11))
def test_filters_are_the_published_ones(moments):
    ours, theirs = torch.tensor(daubechies(moments), dtype=torch.float64), torch.tensor(Wavelet(f"db{moments}").rec_lo)
    torch.testing.assert_close(ours, theirs.double(), rtol=0, atol=1e-6)
    # Orthogonal to its own shifts by even distances, and blind to polynomials of a degree below `moments`.
    for shift in range(moments):
        expect = 1.0 if shift == 0 else 0.0
        assert (ours[2 * shift :] * ours[: len(ours) - 2 * shift]).sum().item() == pytest.approx(expect, abs=1e-7)
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(moments)
    at = torch.linspace(-1, 1, 2 * moments, dtype=torch.float64)
    for degree in range(moments):
        assert (signs * ours * at**degree).sum().item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("sizes", [(8, 12), (7, 9), (9, 8)])
@pytest.mark.parametrize("moments", [1, 2, 5])
@pytest.mark.parametrize("layer", [nn.Linear, Conv1D])
def test_is_pefts_waveft(sizes, moments, layer):
    torch.manual_seed(0)
    host = nn.Linear(*sizes) if layer is nn.Linear else Conv1D(*reversed(sizes))
    count = sizes[0] * sizes[1] // 2
    config = WaveFTConfig(
        n_frequency=count, scaling=3.0, random_loc_seed=5, wavelet_family=f"db{moments}", fan_in_fan_out=layer is Conv1D
    )
    recipe = graft.WaveFT(count=count, scaling=3.0, location_seed=5, moments=moments)
    ours, delta, theirs = both(host, recipe, config)
    pairs = [(delta.value, theirs.waveft_spectrum["default"])]
    fill(pairs)
    same(ours, theirs, pairs, torch.randn(3, 5, sizes[0], dtype=torch.float64))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 17), st.integers(1, 10))
def test_analysis_is_the_transpose_of_synthesis(size, moments):
    eye = torch.eye(coefficients(size, moments), dtype=torch.float64)
    R = synthesised(eye, size, daubechies(moments))
    torch.testing.assert_close(analysed(torch.eye(size, dtype=torch.float64), daubechies(moments)), R.T)
    # A tight frame: what a signal is analysed into gives the signal again.
    torch.testing.assert_close(R @ R.T, torch.eye(size, dtype=torch.float64), rtol=1e-6, atol=1e-6)


def test_few_entries_make_a_change_of_high_rank():
    model = Host(nn.Linear(32, 32).double())
    delta = graft.attach(model, graft.WaveFT(count=64), "host").deltas["host"]
    with torch.no_grad():
        delta.value.normal_()
    assert torch.linalg.matrix_rank(delta.weight(torch.zeros(32, 32))) > 20  # LoRA of as many numbers: 1


def test_no_matrix_of_full_size_is_made_and_only_values_are_stored():
    model = Host(nn.Linear(256, 256))
    adapter = graft.attach(model, graft.WaveFT(count=100), "host")
    x = torch.randn(4, 256)
    assert largest(lambda: model(x).sum().backward()) < 256 * 256
    assert {k: v.numel() for k, v in adapter.state_dict().items()} == {"host:value": 100}


@settings(max_examples=30, deadline=None)
@given(st.integers(30, 40), st.integers(30, 40), st.integers(1, 3), st.integers(1, 3), st.sampled_from([1, 300]))
def test_few_and_many_tokens_meet_the_same_weight(d_in, d_out, count, moments, tokens):
    model, delta = adapted(linear(d_in, d_out), graft.WaveFT(count=count, moments=moments))
    assert delta.index is not None  # coefficients few enough to be seen as entries of W
    acts_as_its_weight(model, delta, tokens)


def test_a_change_too_small_for_the_weight_in_half_precision_still_counts():
    host = nn.Linear(64, 64, bias=False).bfloat16()
    nn.init.ones_(host.weight)
    model, delta = adapted(host, graft.WaveFT(count=1), size=1e-4)
    w = host.weight.detach()
    assert torch.equal(delta.weight(w).bfloat16(), w)
    x = torch.randn(500, 64, dtype=torch.bfloat16)
    x -= x @ w.T / 64  # what W maps to nothing shows the change
    change = (x.float() @ (delta.weight(w.float()) - w.float()).T).abs().max()
    assert change > 0 and (model(x) - x @ w.T).abs().max() > change / 2


def test_many_tokens_may_meet_a_host_with_other_deltas():
    model = nn.Sequential(nn.Linear(16, 16))
    graft.attach(model, "loreft", "0", name="inner", **graft.core.delta.METHODS["loreft"].small)
    x = torch.randn(500, 16)
    before = model(x)
    delta = graft.attach(model, graft.WaveFT(count=2), "0").deltas["0"]
    torch.testing.assert_close(model(x), before)
    with torch.no_grad():
        delta.value.fill_(0.1)
        change = x @ (delta.weight(model[0].weight) - model[0].weight).T
    torch.testing.assert_close(model(x), before + change)


@pytest.mark.parametrize("method", ["waveft", "fourierft", "ether_plus"])
def test_a_forward_that_was_set_on_the_host_runs_for_many_tokens_too(method):
    """As accelerate sets it, to fetch the weight first."""
    host, weights = nn.Linear(16, 16), nn.Linear(16, 16)
    host.forward = lambda x: weights(x)
    model, _ = adapted(
        host, graft.core.delta.METHODS[method](**({} if method == "ether_plus" else {"count": 2})), size=0
    )
    x = torch.randn(500, 16)
    torch.testing.assert_close(model(x), weights(x))


@pytest.mark.parametrize("recipe", [graft.WaveFT(count=9), graft.FourierFT(count=40), graft.C3A(block=16)])
def test_many_tokens_in_half_precision_meet_a_change_that_w_would_lose(recipe):
    host = nn.Linear(48, 32, bias=False).bfloat16()
    nn.init.ones_(host.weight)
    model, delta = adapted(host, recipe, size=2e-5)
    signs = torch.randn(400, 24).sign()
    x = torch.cat([signs, -signs], 1).bfloat16()  # what W maps to nothing shows the change
    w = host.weight.float()
    assert torch.equal(delta.weight(w).bfloat16(), host.weight)
    y, change = model(x), x.float() @ delta.weight(torch.zeros_like(w)).T
    torch.testing.assert_close(y.float(), change, rtol=0, atol=0.02 * change.abs().max().item())
    probe, (value,) = torch.randn(y.shape), delta.parameters()
    ours, theirs = (torch.autograd.grad((out * probe).sum(), value)[0] for out in (y, change))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.02 * theirs.abs().max().item())
