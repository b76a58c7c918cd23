"""The data-emphasised bound: against torch's own divergence, a closed form, and what the factor of the data is for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import MultivariateNormal, kl_divergence

import graft
from graft.searching.oneshot.elbo import DataEmphasizedELBO


@given(seed=st.integers(0, 2**16), sigma=st.floats(0.01, 2.0))
@settings(max_examples=20, deadline=None)
def test_the_divergence_is_that_of_two_gaussians_with_the_best_variance_of_the_prior(seed, sigma):
    torch.manual_seed(seed)
    weights, mean = torch.randn(3, 2, requires_grad=True), torch.randn(3, 2)
    bound = DataEmphasizedELBO({"w": [weights]}, count=4, means={"w": [mean]}, sigma=sigma)
    tau = bound.variances()["w"].item()
    q = MultivariateNormal(weights.flatten(), sigma**2 * torch.eye(6))

    def against(tau):
        return kl_divergence(q, MultivariateNormal(mean.flatten(), tau * torch.eye(6)))

    torch.testing.assert_close(bound.divergence(), against(tau), rtol=1e-3, atol=1e-4)
    assert against(tau) <= min(against(0.98 * tau), against(1.02 * tau))
    torch.testing.assert_close(bound(), bound.divergence() / 6)  # kappa n = D


def regression(n=30, d=300, seed=0):
    """Answers that five directions decide, in which inputs vary most; many more weights than examples."""
    draw = torch.Generator().manual_seed(seed)
    ways = torch.linalg.qr(torch.randn(d, 5, generator=draw))[0].T
    truth = torch.randn(5, generator=draw) @ ways
    X, Z = ((3 * torch.randn(m, 5, generator=draw) @ ways + 0.1 * torch.randn(m, d, generator=draw)) for m in (n, 400))
    return X, X @ truth + torch.randn(n, generator=draw), Z, Z @ truth


def fitted(X, y, kappa, steps=400):
    """The mean and sigma that minimise the bound, with the expected NLL of noise of variance 1 in closed form."""
    w = torch.zeros(X.shape[1], requires_grad=True)
    bound = DataEmphasizedELBO({"w": [w]}, count=len(X), kappa=kappa, sigma=0.1)
    tuner = torch.optim.Adam([w, *bound.parameters()], lr=2e-2)
    for _ in range(steps):
        tuner.zero_grad()
        nll = ((X @ w - y).square().mean() + bound.sigma.square() * X.square().sum() / len(X)) / 2
        (nll + bound()).backward()
        tuner.step()
    return w.detach(), (bound.sigma.square() / bound.variances()["w"]).item()


def test_the_gradient_of_a_sample_is_that_of_the_reparametrised_loss():
    w = torch.randn(5, requires_grad=True)
    bound = DataEmphasizedELBO({"w": [w]}, count=3, sigma=0.3)
    x = torch.randn(5)
    torch.manual_seed(1)
    with bound.sampled():
        (w @ x).square().backward()
    got = w.grad.clone(), bound.raw.grad.clone()
    torch.manual_seed(1)
    noise = torch.randn_like(w)
    wanted = torch.autograd.grad(((w + bound.sigma * noise) @ x).square(), [w, bound.raw])
    for a, b in zip(got, wanted):
        torch.testing.assert_close(a, b)


def test_without_emphasis_the_prior_wins_and_with_it_the_strength_is_as_good_as_the_best_of_a_grid():
    X, y, Z, t = regression()

    def error(w):
        return (Z @ w - t).square().mean().item()

    def ridge(strength):
        return torch.linalg.solve(X.T @ X / len(X) + strength * torch.eye(X.shape[1]), X.T @ y / len(X))

    (plain, all_noise), (emphasised, noise) = fitted(X, y, 1.0), fitted(X, y, None)
    grid = [error(ridge(10.0**e)) for e in range(-6, 4)]

    assert all_noise > 1.5 * noise  # the share of q's spread that is in the prior's variance
    assert error(emphasised) < 1.1 * min(grid) and 1.5 * error(emphasised) < error(plain)


def test_a_group_without_weights_is_refused():
    with pytest.raises(graft.GraftError, match="in each group"):
        DataEmphasizedELBO({"w": []}, count=3)
