"""Search for a Pareto front of two objectives. AutoPEFT: Zhou et al., 2024."""

import math

import numpy as np

from ..gaussian import improvement
from ..modelled import Fitted, Modelled
from ..outcome import front
from ..space import Point

ROOM = 0.1  # of the range of each objective that the reference point lies beyond the worst of the front


class AutoPEFT(Modelled):
    """The point with the largest expected improvement of the hypervolume of the front, under Gaussian processes whose
    priors let few dimensions matter, one for each objective.

    For losses a, b of a front sorted by a, the expectation over independent normal (f, g) is a sum over strips,

        sum_i (E max(a_i+1 - f, 0) - E max(a_i - f, 0)) E max(b_i - g, 0),

    with a_0 = -inf, and the reference point as last a and first b. The front is that of the models' means at the points
    that were tried, for what was measured is noisy. A space as the paper's, with serial and parallel adapters and
    prefixes of some sizes and a switch for every layer, is the text

        pfeiffer(size=0|6|24|96)+parallel_adapter(size=0|6|24|96)+prefix_tuning(length=0|1|8|64) in any blocks

    The paper samples the length scales (SAAS) and takes the noisy expected improvement of the hypervolume by sampling;
    here the length scales are the likeliest ones, and the expectation is exact.

    AutoPEFT: Automatic Configuration Search for Parameter-Efficient Fine-Tuning. Zhou et al., 2024.
    https://arxiv.org/abs/2301.12132
    """

    name = "autopeft"
    most = 2

    def model(self, points: list[Point], x: np.ndarray, fit: Fitted) -> Point | None:
        if self.objectives == 1:
            f = fit.of_loss(0, sparse=True)
            worth = improvement(*f(x), f(fit.x)[0].min())
        else:
            pair = [fit.of_loss(i, sparse=True) for i in (0, 1)]
            means = np.stack([p(fit.x)[0] for p in pair], 1)
            kept = np.array([o.losses is not None and all(v <= 0 for v in o.over.values()) for o in fit.outcomes])
            worth = hypervolume_improvement(*pair[0](x), *pair[1](x), means[kept] if kept.any() else means)
        return points[int((worth * self.probability(x, fit)).argmax())]

    def probability(self, x: np.ndarray, fit: Fitted) -> np.ndarray:
        """Of keeping to all limits."""
        from scipy.special import ndtr

        made = np.ones(len(x))
        for name in self.limits:
            if (process := fit.of_limit(name)) is not None:
                mean, deviation = process(x)
                made *= ndtr(-mean / deviation)
        return made


def hypervolume_improvement(
    mean_a: np.ndarray, deviation_a: np.ndarray, mean_b: np.ndarray, deviation_b: np.ndarray, losses: np.ndarray
) -> np.ndarray:
    """E of how much a point [n] adds to the area between the front of losses [m, 2] and the reference point."""
    kept = losses[front([tuple(row) for row in losses])]
    kept = kept[kept[:, 0].argsort()]
    low, high = losses.min(0), losses.max(0)
    reference = high + ROOM * np.maximum(high - low, 1e-12)
    edges = np.r_[-math.inf, kept[:, 0], reference[0]]
    heights = np.r_[reference[1], kept[:, 1]]
    total, before = np.zeros(len(mean_a)), np.zeros(len(mean_a))
    for edge, height in zip(edges[1:], heights):
        now = improvement(mean_a, deviation_a, edge)
        total += (now - before) * improvement(mean_b, deviation_b, height)
        before = now
    return total
