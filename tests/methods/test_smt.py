"""SMT: finds the blocks in which a teacher differs, and computes their gradients only."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sizes import Sizes
from torch import nn

import graft


@pytest.mark.parametrize("choice", ["mean_abs", "abs_mean"])
def test_finds_the_blocks_in_which_a_teacher_differs(choice):
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(12, 8), "b": nn.Linear(16, 12)})
    truth = {"a": [3], "b": [0, 7]}  # of grids 2 x 3 and 3 x 4
    teacher = {}
    for name, host in model.items():
        blocks = host.weight.detach().clone().unflatten(1, (-1, 4)).unflatten(0, (-1, 4))
        for i in truth[name]:
            blocks[i // blocks.shape[2], :, i % blocks.shape[2]] += 0.5
        teacher[name] = blocks.flatten(2).flatten(0, 1)
    inputs = {name: torch.randn(500, host.in_features) for name, host in model.items()}
    loss = lambda m, _: sum(
        (m[n](x) - nn.functional.linear(x, teacher[n], m[n].bias)).square().mean() for n, x in inputs.items()
    )
    stats = graft.collect(model, [None], ("weight_grad",), ["a", "b"], loss)
    adapter = graft.attach(model, graft.SMT(size=4, density=3 / 18, choice=choice), ["a", "b"], stats=stats)
    assert {name: d.index.tolist() for name, d in adapter.deltas.items()} == truth


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 4), columns=st.integers(1, 4), size=st.integers(1, 3), seed=st.integers(0, 50), data=st.data()
)
def test_gradients_are_the_blocks_of_the_dense_one(rows, columns, size, seed, data):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(columns * size, rows * size)).double()
    stats = {"0": {"weight_grad": torch.randn(rows * size, columns * size)}}
    keep = data.draw(st.integers(1, rows * columns))
    delta = graft.attach(model, graft.SMT(size=size, density=keep / (rows * columns)), "0", stats=stats).deltas["0"]
    x, g = torch.randn(5, columns * size).double(), torch.randn(5, rows * size).double()
    (found,) = torch.autograd.grad(model(x), delta.value, g)
    dense = (g.T @ x).view(rows, size, columns, size)
    expect = torch.stack([dense[i // columns, :, i % columns] for i in delta.index.tolist()])
    torch.testing.assert_close(found, expect)


def test_nothing_of_the_size_of_the_matrix_is_made():
    model = nn.Sequential(nn.Linear(64, 48))
    stats = {"0": {"weight_grad": torch.randn(48, 64)}}
    delta = graft.attach(model, graft.SMT(size=8, density=0.05), "0", stats=stats).deltas["0"]
    with Sizes() as sizes:
        torch.autograd.grad(model(torch.randn(3, 64)).sum(), delta.value)
    assert max(sizes.made) < 48 * 64


def test_a_size_that_does_not_divide_is_refused():
    stats = {"0": {"weight_grad": torch.randn(6, 8)}}
    with pytest.raises(graft.GraftError, match=r"size must divide both sides of 0 \[6, 8\], 4 does not"):
        graft.attach(nn.Sequential(nn.Linear(8, 6)), graft.SMT(size=4), "0", stats=stats)
