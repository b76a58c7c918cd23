"""Constrained search that says when the limits cannot be kept to (Xu et al., 2023), from what other tasks say."""

import math

import numpy as np

from ..modelled import Fitted, Modelled
from ..space import Point

WIDTH = 2.0  # sqrt(beta): standard deviations from the mean to the lower bound
SURE = 3.0  # of the bound that declares the limits impossible
TRUST = 10.0  # beta: after so many points, a factor e of pi weighs as much as one standard deviation of the losses


class Config(Modelled):
    """The point with the lowest optimistic loss among those that may keep to the limits:

        min over x of m_f(x) - w s_f(x) - d (beta / n) log pi(x)   where   m_g(x) - w s_g(x) <= 0 for every limit g

    with mean m and deviation s of a Gaussian process for the loss f and for each g = log(value / limit), and w = 2 (the
    paper's code has 3 unless told otherwise). Where no point may keep to the limits, though it were w = 3, the verdict
    is that none does. Without limits and beliefs this is GP-LCB.

    pi is what is believed of the best point before the search (`Beliefs`), and counts for less the more points n are
    known: with d the standard deviation of the losses, exp(-bound / d) pi^(beta / n) is as large as can be, which is
    piBO with this bound instead of the expected improvement; beta = 10 as in the library NePS.

    Constrained Efficient Global Optimization of Expensive Black-box Functions. Xu et al., 2023.
    https://arxiv.org/abs/2211.00162
    piBO: Augmenting Acquisition Functions with User Beliefs for Bayesian Optimization. Hvarfner et al., 2022.
    https://arxiv.org/abs/2204.11051
    """

    name = "config"
    most = 1

    def model(self, points: list[Point], x: np.ndarray, fit: Fitted) -> Point | None:
        lowest, least = np.full(len(points), -math.inf), np.full(len(points), -math.inf)
        for name in self.limits:
            if (process := fit.of_limit(name)) is not None:
                mean, deviation = process(x)
                lowest = np.maximum(lowest, mean - WIDTH * deviation)
                least = np.maximum(least, mean - SURE * deviation)
        if least.min() > 0 and not any(o.feasible for o in fit.outcomes):
            self.verdict = "no point of the space is likely to keep to the limits"
            return None
        process = fit.of_loss(0)
        mean, deviation = process(x)
        bound = mean - WIDTH * deviation - process.scale * TRUST / len(fit.points) * self.density(points)
        if lowest.min() > 0:  # nothing new may keep to them: what comes nearest
            bound = lowest
        else:
            bound = np.where(lowest > 0, math.inf, bound)
        return points[int(bound.argmin())]
