"""Hydra: the two branches, as two layers beside and behind the host, and what is the mark of each."""

import pytest
import torch
from torch import nn

import graft
from models import move


def test_is_two_layers_beside_and_behind_the_host():
    torch.manual_seed(0)
    host = nn.Linear(7, 5).double()
    model = nn.Sequential(host)
    x = torch.randn(4, 7, dtype=torch.float64)
    y = model(x)
    delta = move(graft.attach(model, graft.Hydra(rank=3, sequential_rank=2, scale=0.7), "0")).deltas["0"]
    layers = {}
    for name in "ABCD":
        p = getattr(delta, name)
        layers[name] = nn.Linear(p.shape[1], p.shape[0], bias=False).double()
        layers[name].weight = nn.Parameter(p.detach().clone())
    expect = y + 0.7 * layers["B"](layers["A"](x)) + 0.7 * layers["D"](layers["C"](y))
    torch.testing.assert_close(model(x), expect)
    expect.sin().sum().backward()
    model(x).sin().sum().backward()
    for name in "ABCD":
        torch.testing.assert_close(getattr(delta, name).grad, layers[name].weight.grad)


def test_the_sequential_change_stays_in_the_rows_of_w_and_the_parallel_one_does_not():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 4)).double()
    w = model[0].weight.detach().clone()
    adapter = move(graft.attach(model, graft.Hydra(), "0"))
    delta, outside = adapter.deltas["0"], torch.eye(9, dtype=torch.float64) - torch.linalg.pinv(w) @ w
    for branch, stays in (("B", True), ("D", False)):
        with torch.no_grad():
            kept = getattr(delta, branch).clone()
            getattr(delta, branch).zero_()
            change = delta.weight(w) - w
            getattr(delta, branch).copy_(kept)
        assert torch.linalg.matrix_rank(change) == 2
        assert bool(((change @ outside).abs() < 1e-9).all()) == stays


def test_merges_the_bias_too():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5)).double()
    move(graft.attach(model, "hydra", "0"))
    x = torch.randn(4, 7, dtype=torch.float64)
    y = model(x)
    state = graft.merged_state_dict(model)
    torch.testing.assert_close(nn.functional.linear(x, state["0.weight"], state["0.bias"]), y)
    assert not torch.allclose(state["0.bias"], model[0].bias)


def test_a_grouped_convolution_is_refused():
    model = nn.Sequential(nn.Conv2d(4, 6, 2, groups=2))
    with pytest.raises(graft.GraftError, match="hydra cannot work at 0: it is a convolution in 2 groups"):
        graft.attach(model, "hydra", "0")
