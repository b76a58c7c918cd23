"""Hypergradients against closed forms, against backward through the steps, and at work."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import graft
from graft.searching.oneshot.hypergradient import descend, hypergradient, l2


def ridge(seed, n=12, d=5):
    """L_T = |Xw - y|^2 / 2n + sum_i exp(h_i) w_i^2 / 2 and L_V = |Zw - t|^2 / 2n: losses and their matrices."""
    draw = torch.Generator().manual_seed(seed)
    X, Z = (torch.randn(n, d, generator=draw, dtype=torch.float64) for _ in range(2))
    w0 = torch.randn(d, generator=draw, dtype=torch.float64)
    y, t = (M @ w0 + torch.randn(n, generator=draw, dtype=torch.float64) for M in (X, Z))
    h = torch.randn(d, generator=draw, dtype=torch.float64) - 1
    return X, y, Z, t, h.requires_grad_()


def solution(X, y, h):
    return torch.linalg.solve(X.T @ X / len(X) + torch.diag(h.exp()), X.T @ y / len(X))


@given(seed=st.integers(0, 2**16))
@settings(max_examples=8, deadline=None)
def test_ridge_has_the_hypergradient_of_its_closed_form(seed):
    X, y, Z, t, h = ridge(seed)
    w = solution(X, y, h).detach().requires_grad_()

    def train():
        return (X @ w - y).square().mean() / 2 + (h.exp() * w.square()).sum() / 2

    def validation():
        return (Z @ w - t).square().mean() / 2

    (exact,) = torch.autograd.grad((Z @ solution(X, y, h) - t).square().mean() / 2, h)
    H, penalty = X.T @ X / len(X) + torch.diag(h.detach().exp()), (h.exp() * w).detach()
    rate, slope = float(1 / torch.linalg.eigvalsh(H)[-1]), (Z.T @ (Z @ w - t) / len(Z)).detach()
    for terms in (0, 3, 30, 1000):  # what is left of the series is (I - rate H)^(terms + 1) H^-1 dL_V/dw
        (found,) = hypergradient(train, validation, [w], [h], rate=rate, terms=terms)
        left = torch.linalg.matrix_power(torch.eye(len(H)) - rate * H, terms + 1) @ torch.linalg.solve(H, slope)
        torch.testing.assert_close(found, exact + penalty * left)
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-8)
    nudge = torch.zeros_like(h)
    nudge[0] = 1e-5
    sides = [(Z @ solution(X, y, h.detach() + s * nudge) - t).square().mean() / 2 for s in (1, -1)]
    torch.testing.assert_close(found[0], (sides[0] - sides[1]) / 2e-5, rtol=1e-4, atol=1e-8)


@given(seed=st.integers(0, 2**16), steps=st.integers(1, 6))
@settings(max_examples=20, deadline=None)
def test_the_series_is_backward_through_the_last_steps_at_the_optimum(seed, steps):
    X, y, Z, t, h = ridge(seed)
    rate, w = 0.05, solution(X, y, h).detach().requires_grad_()

    def loss(w):
        return (X @ w - y).square().mean() / 2 + (h.exp() * w.square()).sum() / 2

    moved = w
    for _ in range(steps):
        moved = moved - rate * torch.autograd.grad(loss(moved), moved, create_graph=True)[0]
    (wanted,) = torch.autograd.grad((Z @ moved - t).square().mean(), h)
    (found,) = hypergradient(lambda: loss(w), lambda: (Z @ w - t).square().mean(), [w], [h], rate=rate, terms=steps - 1)
    torch.testing.assert_close(found, wanted)


def test_a_hyperparameter_of_the_validation_loss_itself_counts():
    w, h = torch.tensor([2.0], requires_grad=True), torch.tensor([3.0], requires_grad=True)
    (found,) = hypergradient(lambda: (w - h).square().sum() / 2, lambda: (w * h).sum(), [w], [h], rate=1.0)
    torch.testing.assert_close(found, torch.tensor([2.0 + 3.0]))  # w* = h: pL_V/ph + pL_V/pw dw*/dh


def test_a_strength_for_each_weight_found_in_one_run_beats_the_best_of_many_random_ones():
    draw, d = torch.Generator().manual_seed(0), 20
    truth = torch.zeros(d, dtype=torch.float64)
    truth[:3] = torch.tensor([1.0, -2.0, 1.5])
    X, Z = (torch.randn(n, d, generator=draw, dtype=torch.float64) for n in (25, 60))
    y, t = (M @ truth + torch.randn(len(M), generator=draw, dtype=torch.float64) for M in (X, Z))
    h = torch.full((d,), -2.0, dtype=torch.float64, requires_grad=True)
    w = torch.zeros(d, dtype=torch.float64, requires_grad=True)

    def train():
        return (X @ w - y).square().mean() / 2 + (h.exp() * w.square()).sum() / 2

    def validation():
        return (Z @ w - t).square().mean() / 2

    losses = descend(train, validation, [w], [h], rounds=60, steps=10, rate=0.1, hyper_rate=0.1, terms=20)
    random = 6 * torch.rand(100, d, generator=draw, dtype=torch.float64) - 4
    tried = [float((Z @ solution(X, y, r) - t).square().mean() / 2) for r in random]
    assert losses[-1] < min(tried) and losses[-1] < losses[0]
    assert h[:3].max() < h[3:].median()


def test_the_penalty_of_an_adapter_is_the_sum_over_its_sites():
    adapter = graft.attach(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)), graft.LoRA(rank=2), ["0", "1"])
    strengths = torch.tensor([0.5, -1.0])
    wanted = 0.0
    for strength, delta in zip(strengths, adapter.deltas.values()):
        wanted += 0.5 * strength.exp() * torch.cat([delta.A.flatten(), delta.B.flatten()]).square().sum()
    torch.testing.assert_close(l2(adapter, strengths), wanted)
    with pytest.raises(graft.GraftError, match="2 sites"):
        l2(adapter, torch.zeros(3))


def test_bad_settings_are_refused():
    w = torch.ones(1, requires_grad=True)
    with pytest.raises(graft.GraftError, match="rate above 0"):
        hypergradient(lambda: w.sum(), lambda: w.sum(), [w], [w], rate=0.0)
