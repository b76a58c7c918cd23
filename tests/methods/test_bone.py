"""Bone: the affine map of every block, by loops; PEFT's layer; what is kept for backward."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft_reference import peft_layer
from torch import nn

import graft


def adapted(host, seed=0, **hyper):
    model = nn.Sequential(host)
    adapter = graft.attach(model, graft.Bone(**hyper), "0")
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in adapter.parameters():
            p.normal_()
    return model, adapter.deltas["0"]


def dense(w, D):
    new, b = w.clone(), D.shape[-1]
    for i in range(0, len(w), b):
        for j in range(0, w.shape[1], b):
            new[i : i + b, j : j + b] += w[i : i + b, j : j + b] @ D[i // b] + D[i // b]
    return new


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 3), columns=st.integers(1, 3), block=st.integers(1, 4), seed=st.integers(0, 99))
def test_maps_every_block(rows, columns, block, seed):
    host = nn.Linear(columns * block, rows * block, dtype=torch.float64)
    w, x = host.weight.detach(), torch.randn(2, 5, columns * block, dtype=torch.float64)
    model, delta = adapted(host, seed, block=block)
    torch.testing.assert_close(delta.weight(w), dense(w, delta.D))
    y = model(x)
    expect = x @ dense(w, delta.D).T + host.bias
    torch.testing.assert_close(y, expect)
    ours, theirs = (torch.autograd.grad(v.sin().sum(), delta.D)[0] for v in (y, expect))
    torch.testing.assert_close(ours, theirs)


def test_equals_peft():
    peft = pytest.importorskip("peft")
    host = nn.Linear(8, 12).double()
    reference = peft_layer(host, peft.MissConfig(r=4, init_weights="bat"))
    model, delta = adapted(host, block=4)
    with torch.no_grad():
        reference.miss_block["default"].copy_(delta.D)
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(model(x), reference(x))


def test_a_block_that_does_not_fit_is_refused():
    with pytest.raises(graft.GraftError, match=r"bone: block 3 must divide both sizes of 0 \(6 x 8\)"):
        graft.attach(nn.Sequential(nn.Linear(8, 6)), graft.Bone(block=3), "0")
