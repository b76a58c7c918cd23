"""C3A against PEFT, and against circulant matrices."""

import pytest
import torch
from against_peft import both, fill
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import C3AConfig
from peft_reference import Host
from scipy.linalg import circulant
from sizes import largest
from torch import nn

import graft


@pytest.mark.parametrize("block", [1, 2, 4])
def test_is_pefts_c3a(block):
    torch.manual_seed(0)
    host, x = nn.Linear(8, 12), torch.randn(3, 5, 8, dtype=torch.float64)
    ours, delta, theirs = both(host, graft.C3A(block=block), C3AConfig(block_size=block))
    fill([(delta.kernel, theirs.c3a_kernel["default"])])
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)  # PEFT computes in float32


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 7))
def test_blocks_are_circulant(m, n, block):
    model = Host(nn.Linear(n * block, m * block).double())
    delta = graft.attach(model, graft.C3A(block=block), "host").deltas["host"]
    with torch.no_grad():
        delta.kernel.normal_()
    blocks = [[torch.from_numpy(circulant(k).T.copy()) for k in row] for row in delta.kernel.detach().numpy()]
    dense = model.host.weight + torch.cat([torch.cat(row, 1) for row in blocks]) / (n * block)
    x = torch.randn(4, n * block, dtype=torch.float64)
    torch.testing.assert_close(model(x), x @ dense.T + model.host.bias)


def test_the_block_is_the_greatest_common_divisor_unless_given_and_the_change_may_have_full_rank():
    model = Host(nn.Linear(24, 36).double())
    delta = graft.attach(model, graft.C3A(), "host").deltas["host"]
    assert delta.block == 12 and delta.kernel.shape == (3, 2, 12)
    with torch.no_grad():
        delta.kernel.normal_()
    assert torch.linalg.matrix_rank(delta.weight(torch.zeros(36, 24))) == 24


def test_a_block_that_does_not_divide_is_refused():
    with pytest.raises(graft.GraftError, match="block 8 must divide both sizes of host, 8 and 12: a divisor of 4 does"):
        graft.attach(Host(nn.Linear(8, 12)), graft.C3A(block=8), "host")


def test_no_matrix_of_full_size_is_made():
    model = Host(nn.Linear(256, 256))
    graft.attach(model, graft.C3A(block=64), "host")
    x = torch.randn(4, 256)
    assert largest(lambda: model(x).sum().backward()) < 256 * 256


@pytest.mark.parametrize("block", [1, 2, 3, 4, 6])
def test_gradients_are_those_of_the_dense_matrix_for_one_token_too(block):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 24, dtype=torch.float64))
    delta = graft.attach(model, graft.C3A(block=block), "0").deltas["0"]
    with torch.no_grad():
        delta.kernel.normal_()
    x = torch.randn(12, dtype=torch.float64, requires_grad=True)
    given = (x, delta.kernel)
    dense = torch.nn.functional.linear(x, delta.weight(model[0].weight), model[0].bias)
    ours, theirs = (torch.autograd.grad(y.sin().sum(), given) for y in (model(x), dense))
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b)
    assert torch.autograd.gradgradcheck(model, (x,))
