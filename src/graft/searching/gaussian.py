"""Gaussian process regression, small: some hundred observations."""

import math

import numpy as np
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import minimize
from scipy.special import ndtr

NOISE = math.log(1e-2)  # mean of the logarithm of the variance of the noise, of observations with variance 1
SHRINKAGE = 0.1  # scale of the prior of the sparse kernel
JITTER = 1e-8


class GaussianProcess:
    """f ~ GP(m, s^2 k) from observations x [n, d] in [0, 1] and y [n] = f(x) + noise.

    k is Matérn 5/2 with a length scale l_i for each dimension: (1 + a + a^2 / 3) exp(-a), a^2 = 5 sum_i (d_i / l_i)^2.
    Length scales, s^2 and the noise are those with the largest posterior density, of their logarithms. The length
    scales are log-normal about sqrt(d) / 2; or, `sparse`, 1 / l_i^2 is half-Cauchy with scale t, and t half-Cauchy with
    scale 0.1, so that few dimensions matter (the prior of SAASBO, here at its mode).

    High-Dimensional Bayesian Optimization with Sparse Axis-Aligned Subspaces. Eriksson, Jankowiak, 2021.
    https://arxiv.org/abs/2103.00349
    """

    def __init__(self, x: np.ndarray, y: np.ndarray, *, sparse: bool = False):
        self.x, self.middle, self.scale = x, float(np.mean(y)), float(np.std(y)) or 1.0
        self.y, self.sparse = (y - self.middle) / self.scale, sparse
        self.squares = (x[:, None, :] - x[None, :, :]) ** 2
        d = x.shape[1]
        self.usual = math.log(0.5 * math.sqrt(d))
        start = np.r_[np.full(d, self.usual), 0.0, NOISE, *([math.log(SHRINKAGE)] if sparse else [])]
        bounds = [(-4.0, 6.0)] * d + [(-4.0, 4.0), (math.log(1e-6), 1.0)] + [(-12.0, 4.0)] * sparse
        found = minimize(self._cost, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 50})
        self.lengths, (self.variance, self.noise) = np.exp(found.x[:d]), np.exp(found.x[d : d + 2])
        self.factor = cho_factor(self._matrix()[0], lower=True)
        self.weights = cho_solve(self.factor, self.y)

    def __call__(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of f at points [m, d]."""
        squares = ((x[:, None, :] - self.x[None, :, :]) ** 2 / self.lengths**2).sum(-1)
        k = self.variance * _matern(np.sqrt(5 * squares))
        left = self.variance - (k * cho_solve(self.factor, k.T).T).sum(1)
        return self.middle + self.scale * (k @ self.weights), self.scale * np.sqrt(np.maximum(left, 1e-12))

    def _matrix(self) -> tuple[np.ndarray, np.ndarray]:
        a = np.sqrt(5 * (self.squares / self.lengths**2).sum(-1))
        k = self.variance * _matern(a)
        return k + (self.noise + JITTER) * np.eye(len(self.y)), a

    def _cost(self, at: np.ndarray) -> tuple[float, np.ndarray]:
        """Minus the logarithm of the posterior density, and its gradient."""
        d = self.x.shape[1]
        self.lengths, (self.variance, self.noise) = np.exp(at[:d]), np.exp(at[d : d + 2])
        matrix, a = self._matrix()
        factor = cho_factor(matrix, lower=True)
        weights, inverse = cho_solve(factor, self.y), cho_solve(factor, np.eye(len(self.y)))
        cost = 0.5 * self.y @ weights + np.log(np.diag(factor[0])).sum()
        outer = inverse - np.outer(weights, weights)  # the gradient by an entry of the matrix is half of it
        slope = self.variance * (5 / 3) * (1 + a) * np.exp(-a)
        gradient = np.zeros_like(at)
        gradient[:d] = 0.5 * np.einsum("ij,ijk->k", outer * slope, self.squares) / self.lengths**2
        gradient[d] = 0.5 * (outer * self.variance * _matern(a)).sum()
        gradient[d + 1] = 0.5 * self.noise * np.trace(outer)
        prior, by = self._prior(at)
        return float(cost + prior), gradient + by

    def _prior(self, at: np.ndarray) -> tuple[float, np.ndarray]:
        d, by = self.x.shape[1], np.zeros_like(at)
        cost = 0.5 * float(at[d] ** 2 + ((at[d + 1] - NOISE) / 1.5) ** 2)
        by[d], by[d + 1] = at[d], (at[d + 1] - NOISE) / 1.5**2
        if not self.sparse:
            off = at[:d] - self.usual
            by[:d] = off
            return cost + 0.5 * float(off @ off), by
        # Of u = log 1 / l^2: -log density = log(1 + e^(2 (u - t))) - (u - t); of t = log scale the same about log 0.1.
        off, top = -2 * at[:d] - at[d + 2], at[d + 2] - math.log(SHRINKAGE)
        slopes = 2 / (1 + np.exp(-2 * off)) - 1
        by[:d], by[d + 2] = -2 * slopes, 2 / (1 + math.exp(-2 * top)) - 1 - slopes.sum()
        cost += float((np.logaddexp(0, 2 * off) - off).sum()) + float(np.logaddexp(0, 2 * top) - top)
        return cost, by


def _matern(a: np.ndarray) -> np.ndarray:
    return (1 + a + a * a / 3) * np.exp(-a)


def improvement(mean: np.ndarray, deviation: np.ndarray, best: np.ndarray | float) -> np.ndarray:
    """E max(best - f, 0) of a normal f."""
    z = (best - mean) / deviation
    return deviation * (z * ndtr(z) + np.exp(-0.5 * z * z) / math.sqrt(2 * math.pi))
