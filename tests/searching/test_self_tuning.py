"""Best responses against the closed form of ridge regression; and votes."""

import itertools

import pytest
import torch

import graft
from graft.searching.oneshot.self_tuning import BestResponse, self_tune
from graft.searching.oneshot.voting import vote


def ridge():
    draw = torch.Generator().manual_seed(1)
    truth = torch.randn(8, generator=draw) * torch.tensor([2.0, 1, 1, 0.2, 0, 0, 0, 0])
    X, Z = (torch.randn(n, 8, generator=draw) for n in (16, 200))
    y, t = (M @ truth + 1.5 * torch.randn(len(M), generator=draw) for M in (X, Z))

    def solution(h):
        return torch.linalg.solve(X.T @ X / len(X) + h.exp() * torch.eye(8), X.T @ y / len(X))

    def train(weights, h):
        (w,) = weights
        return (X @ w - y).square().mean() / 2 + h[0].exp() * w.square().sum() / 2

    def validation(weights, h):
        return (Z @ weights[0] - t).square().mean() / 2

    return solution, train, validation


def test_weights_answer_hyperparameters_as_the_closed_form_does():
    solution, train, validation = ridge()
    torch.manual_seed(0)
    h = torch.tensor([-1.0])
    net = BestResponse([torch.zeros(8, requires_grad=True)], h, scale=0.3)
    self_tune(net, train, validation, rounds=500, train_steps=2, rate=2e-2, hyper_rate=0.0)
    self_tune(net, train, validation, rounds=200, train_steps=2, rate=2e-3, hyper_rate=0.0)
    slope = torch.autograd.functional.jacobian(lambda h: net(h)[0], h)[:, 0]
    exact = torch.autograd.functional.jacobian(lambda h: solution(h[0]), h)[:, 0]
    torch.testing.assert_close(net(h)[0], solution(h[0]), rtol=0, atol=0.05)
    assert torch.cosine_similarity(slope, exact, dim=0) > 0.95
    assert 0.7 < slope.norm() / exact.norm() < 1.4


def test_one_run_finds_a_strength_as_good_as_the_best_of_a_grid():
    solution, train, validation = ridge()
    torch.manual_seed(0)
    w = torch.zeros(8, requires_grad=True)
    net = BestResponse([w], torch.tensor([-4.0]))
    schedule = self_tune(net, train, validation, rounds=1000, rate=1e-2, hyper_rate=1e-2)
    grid = [float(validation([solution(h)], None)) for h in torch.arange(-6.0, 3.0, 0.25)]
    assert (
        float(validation([w.detach()], None))
        < 1.02 * min(grid)
        < float(validation([solution(torch.tensor(-4.0))], None))
    )
    assert len(schedule) == 1000 and torch.equal(schedule[-1], net.hypers.detach())


def test_bad_settings_are_refused():
    with pytest.raises(graft.GraftError, match="a vector of hyperparameters"):
        BestResponse([torch.zeros(2)], torch.zeros(2, 2))
    with pytest.raises(graft.GraftError, match="as many answers"):
        vote([["a"], ["a", "b"]])


def test_a_vote_is_the_commonest_answer_and_the_first_of_several():
    for given in itertools.product("abc", repeat=4):
        (said,) = vote([[answer] for answer in given])
        most = max(given.count(answer) for answer in given)
        assert said == next(answer for answer in given if given.count(answer) == most)
