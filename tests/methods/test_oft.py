"""OFT: the rotation is the Cayley transform, orthogonal, and its series tends to it; PEFT's layer."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft_reference import peft_layer
from torch import nn

import graft


def adapted(host, size=1.0, seed=0, **hyper):
    model = nn.Sequential(host)
    adapter = graft.attach(model, graft.OFT(**hyper), "0")
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in adapter.parameters():
            p.normal_(0, size)
    return model, adapter.deltas["0"]


def skew(triangles, block):
    rows = [iter(t.tolist()) for t in triangles]
    Q = torch.zeros(len(triangles), block, block, dtype=triangles.dtype)
    for n, numbers in enumerate(rows):
        for i in range(block):
            for j in range(i + 1, block):
                Q[n, i, j] = next(numbers)
                Q[n, j, i] = -Q[n, i, j]
    return Q


@settings(max_examples=25, deadline=None)
@given(blocks=st.integers(1, 4), block=st.integers(2, 6), d_out=st.integers(1, 9), seed=st.integers(0, 99))
def test_turns_the_inputs_by_the_cayley_transform(blocks, block, d_out, seed):
    host = nn.Linear(blocks * block, d_out, dtype=torch.float64)
    w, x = host.weight.detach().clone(), torch.randn(4, blocks * block, dtype=torch.float64)
    model, delta = adapted(host, seed=seed, block=block)
    Q, eye = skew(delta.triangles.detach(), block), torch.eye(block, dtype=torch.float64)
    R = torch.block_diag(*((eye + q) @ torch.linalg.inv(eye - q) for q in Q))
    torch.testing.assert_close(R @ R.T, torch.eye(len(R), dtype=R.dtype))
    torch.testing.assert_close(model(x), (x @ R) @ w.T + host.bias)
    new = delta.weight(w)
    torch.testing.assert_close(new @ new.T, w @ w.T)


def test_the_series_tends_to_the_exact_rotation():
    exact = adapted(nn.Linear(8, 3).double(), 0.05, block=4)[1].rotation()
    errors = [
        (adapted(nn.Linear(8, 3).double(), 0.05, block=4, terms=k)[1].rotation() - exact).norm() for k in (1, 2, 4, 8)
    ]
    assert all(later < 0.2 * sooner for sooner, later in itertools.pairwise(errors))
    assert errors[-1] < 1e-7


@pytest.mark.parametrize("terms, sign", [(3, 1), (None, -1)])  # PEFT counts the powers of 1 + Q + ...; see OFT
def test_equals_peft(terms, sign):
    peft = pytest.importorskip("peft")
    host = nn.Linear(8, 6).double()
    config = peft.OFTConfig(oft_block_size=4, r=0, use_cayley_neumann=terms is not None, num_cayley_neumann_terms=5)
    reference = peft_layer(host, config)
    model, delta = adapted(host, block=4, terms=terms)
    with torch.no_grad():
        reference.oft_R["default"].weight.copy_(sign * delta.triangles)
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    # PEFT keeps the identity of its exact variant in float32
    torch.testing.assert_close(model(x), reference(x), rtol=1e-6, atol=1e-6)


def test_a_convolution_is_turned_by_its_weight():
    host = nn.Conv2d(2, 6, 2, stride=2, dtype=torch.float64)
    model, delta = adapted(host, block=4)
    x = torch.randn(3, 2, 6, 6, dtype=torch.float64)
    patches = nn.functional.unfold(x, 2, stride=2).mT  # [batch, places, in * kernel]
    R = torch.block_diag(*delta.rotation().detach())
    expect = (patches @ R) @ host.weight.flatten(1).T + host.bias
    torch.testing.assert_close(model(x).flatten(2).mT, expect)


def test_a_block_that_does_not_fit_is_refused():
    with pytest.raises(graft.GraftError, match="oft: block 3 must divide the input size 8 of 0"):
        graft.attach(nn.Sequential(nn.Linear(8, 4)), graft.OFT(block=3), "0")
