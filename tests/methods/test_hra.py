"""HRA: the compact form is the product of the reflections, in order; orthogonal; PEFT's layer."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft_reference import peft_layer
from torch import nn

import graft


def adapted(host, seed=0, **hyper):
    model = nn.Sequential(host)
    adapter = graft.attach(model, graft.HRA(**hyper), "0")
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in adapter.parameters():
            p.normal_()
    return model, adapter.deltas["0"]


def dense(U):
    """H_1 ... H_r, one reflection after the other."""
    product = torch.eye(len(U), dtype=U.dtype)
    for u in U.unbind(1):
        product = product @ (torch.eye(len(U), dtype=U.dtype) - 2 * torch.outer(u, u) / (u @ u))
    return product


@settings(max_examples=25, deadline=None)
@given(d_in=st.integers(2, 12), d_out=st.integers(1, 9), half=st.integers(1, 5), seed=st.integers(0, 99))
def test_is_the_chain_of_reflections(d_in, d_out, half, seed):
    host = nn.Linear(d_in, d_out, dtype=torch.float64)
    w, x = host.weight.detach().clone(), torch.randn(4, d_in, dtype=torch.float64)
    model, delta = adapted(host, seed, rank=2 * half)
    product = dense(delta.U.detach())
    torch.testing.assert_close(model(x), x @ (w @ product).T + host.bias)
    new = delta.weight(w)
    torch.testing.assert_close(new, w @ product)
    torch.testing.assert_close(new @ new.T, w @ w.T)  # an orthogonal map of the inputs keeps all angles of the rows


def test_gradient_is_that_of_the_chain():
    host = nn.Linear(6, 5, dtype=torch.float64)
    model, delta = adapted(host, rank=4)
    x = torch.randn(3, 6, dtype=torch.float64)
    ours = torch.autograd.grad(model(x).sin().sum(), delta.U)[0]
    U = delta.U.detach().requires_grad_()
    theirs = torch.autograd.grad((x @ (host.weight @ dense(U)).T + host.bias).sin().sum(), U)[0]
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("host", [nn.Linear(8, 6).double(), nn.Conv2d(2, 6, 2, bias=True).double()])
def test_equals_peft(host):
    peft = pytest.importorskip("peft")
    reference = peft_layer(host, peft.HRAConfig(r=4, apply_GS=False))
    model, delta = adapted(host, rank=4)
    with torch.no_grad():
        reference.hra_u["default"].copy_(delta.U)
    x = torch.randn(3, 8) if isinstance(host, nn.Linear) else torch.randn(3, 2, 5, 5)
    torch.testing.assert_close(model(x.double()), reference(x.double()))


def test_an_odd_rank_is_refused():
    with pytest.raises(graft.GraftError, match=r"hra: rank must be even .* not 3"):
        graft.attach(nn.Sequential(nn.Linear(4, 4)), graft.HRA(rank=3), "0")
