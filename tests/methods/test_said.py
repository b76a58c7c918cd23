"""SAID against the dense Fastfood matrices, and the meter against a problem whose dimension is known."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import hadamard as dense_hadamard
from torch import nn

import graft
from graft.methods.weight.said import fastfood, hadamard, intrinsic_dimension
from models import llama, move, tokens


@pytest.mark.parametrize("power", range(14))
def test_transform_is_the_hadamard_matrix(power):
    x = torch.randn(2**power, dtype=torch.float64)
    expect = torch.from_numpy(dense_hadamard(2**power)).double() @ x if power < 12 else 2**power * x
    torch.testing.assert_close(hadamard(x) if power < 12 else hadamard(hadamard(x)), expect)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 100), st.booleans(), st.integers(0, 99))
def test_is_fastfood(out, width, dimension, aware, seed):
    model = nn.Sequential(nn.Linear(width, out)).double()
    dimension += aware
    adapter = move(graft.attach(model, graft.SAID(dimension=dimension, structure_aware=aware), "0", seed=seed))
    delta, theta = adapter.deltas["0"], adapter.shared.theta.detach()
    size = out * width
    full = 1 << math.ceil(math.log2(size))
    torch.manual_seed(seed)  # the random numbers in the order of the constructor
    signs = 2.0 * torch.randint(2, (len(delta.signs),)) - 1
    permutation, gains = torch.randperm(full), torch.randn(full).double()
    # As published: all of length `full`; signs behind theta's end meet zeros.
    padded = torch.zeros(full, dtype=torch.float64)
    n = min(len(theta), full)
    padded[:n] = theta[:n] * signs[:n]
    H = torch.from_numpy(dense_hadamard(full)).double()
    ray = (H @ (gains * (H @ padded)[permutation]))[:size]
    ray = ray / (torch.sqrt(full * (gains**2).sum()) * math.sqrt(size / full))
    lam = delta.lam.detach() if aware else 1.0
    torch.testing.assert_close(
        delta.weight(model[0].weight).detach() - model[0].weight.detach(),
        lam * ray.view(out, width),
        rtol=1e-5,
        atol=1e-7,
    )


def test_directions_are_nearly_orthogonal_and_of_equal_length():
    adapter = graft.attach(nn.Sequential(nn.Linear(64, 128)), graft.SAID(dimension=32, structure_aware=False), "0")
    delta = adapter.deltas["0"]
    P = torch.func.jacrev(lambda theta: fastfood(theta, delta.signs, delta.index, delta.gains))(torch.zeros(32))
    gram = P.T @ P
    lengths = gram.diag().sqrt()
    assert (lengths / lengths.mean() - 1).abs().max() < 0.1
    assert (gram / lengths / lengths[:, None] - torch.eye(32)).abs().max() < 0.1


def test_a_file_of_the_model_holds_exactly_the_dimension(tmp_path):
    model = llama()
    adapter = move(graft.attach(model, graft.SAID(dimension=40)))
    assert sum(v.numel() for v in adapter.state_dict().values()) == 40
    adapter.save(tmp_path / "a")
    again = llama()
    graft.load(again, tmp_path / "a")
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)


def test_too_few_numbers_are_refused():
    with pytest.raises(graft.GraftError, match="dimension 14 leaves nothing for theta beside the factors of 14 sites"):
        graft.attach(llama(), graft.SAID(dimension=14))


@pytest.mark.parametrize("constraints", [1, 5, 10])
def test_the_meter_finds_the_dimension_of_a_problem_with_known_solutions(constraints):
    """Li et al. (2018): k linear equations are solved in a random subspace of k dimensions, not of fewer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 20, bias=False)).double()
    equations, goal = torch.randn(constraints, 400).double(), torch.randn(constraints).double()

    def score(dimension):
        copy = nn.Sequential(nn.Linear(20, 20, bias=False)).double()
        copy.load_state_dict(model.state_dict())
        adapter = graft.attach(copy, graft.SAID(dimension=dimension, structure_aware=False), "0")
        left = lambda: equations @ adapter.deltas["0"].weight(copy[0].weight).flatten() - goal
        start, rows = left().detach(), []
        for residual in left():
            rows.append(torch.autograd.grad(residual, adapter.shared.theta, retain_graph=True)[0])
        best = torch.linalg.lstsq(torch.stack(rows), -start[:, None], driver="gelsd").solution
        with torch.no_grad():
            adapter.shared.theta.copy_(best.flatten())
            return 1 - (left().norm() / start.norm()).item()

    asked = []
    found = intrinsic_dimension(lambda d: asked.append(d) or score(d), 1.0, range(1, 33), share=0.999)
    assert found == constraints
    assert len(asked) <= 6
    assert intrinsic_dimension(score, 2.0, [1, 2, 30]) is None
