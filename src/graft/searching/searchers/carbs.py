"""Cost-aware local search around the Pareto front. Fetterman et al., 2023."""

import numpy as np
from scipy.special import ndtr

from ..gaussian import GaussianProcess, improvement
from ..modelled import Fitted, Modelled
from ..space import Point

RADIUS = 0.3  # of the search around a point of the front
CANDIDATES = 100  # for each dimension
CHEAP = 0.2  # share of the runs among which the cheapest point of the front is the best one
MOST = 2000


class CARBS(Modelled):
    """Points near the front of loss and cost are judged by how much better they may be than the front at their cost:

        argmax over x of EI(x; p(max(c(x), t))) N(distance of x to the front; 0, 0.3) P(x works)

    with Gaussian processes for the loss, the logarithm of the cost c in seconds, and p, the loss of the front by its
    cost; EI the expected improvement of the loss below p, where t, log-uniform over the costs of the front, keeps cheap
    and bad points from counting; and P from a model of which runs failed. Candidates are normal about points of the
    front, of deviation 0.3 in each dimension.

    From the paper's code: the radius, the share of 0.2, 100 candidates a dimension. Not taken over: that every fifth
    run is one of the front again, the search beyond the bounds of the space, the transform of the losses to normal
    quantiles, and the exploration bias.

    Tune As You Scale: Hyperparameter Optimization For Compute Efficient Training. Fetterman et al., 2023.
    https://arxiv.org/abs/2306.08055
    """

    name = "carbs"
    most = 1

    def model(self, points: list[Point], x: np.ndarray, fit: Fitted) -> Point | None:
        ran = [i for i, o in enumerate(fit.outcomes) if o.losses is not None and o.cost > 0]
        losses, costs = fit.losses(0)[ran], np.log([fit.outcomes[i].cost for i in ran])
        edge = [ran[i] for i in self.front(losses, costs)]
        origins = [fit.points[i] for i in edge]
        count = min(MOST, CANDIDATES * x.shape[1])
        if self.all is None:
            near = (self.space.near(origins[i], self.rng, RADIUS) for i in self.rng.integers(len(origins), size=count))
            points = self.fresh(near) or points
            x = self.encoded(points)
        mean, deviation = fit.of_loss(0)(x)
        cost, _ = fit.of_cost()(x)
        level = self.level(losses, costs)
        ends = costs[self.front(losses, costs)]
        threshold = self.rng.uniform(ends.min(), ends.max())
        best = np.minimum(level(cost), level(np.array([threshold])))
        squares = ((x[:, None, :] - fit.x[edge][None, :, :]) ** 2).sum(-1).min(1)
        worth = improvement(mean, deviation, best) * np.exp(-0.5 * squares / RADIUS**2) * self.works(x, fit)
        return points[int(worth.argmax())]

    @staticmethod
    def front(losses: np.ndarray, costs: np.ndarray) -> list[int]:
        """The best of the cheapest, and from there each dearer one that is better than all before."""
        cheap = np.flatnonzero(costs <= np.quantile(costs, CHEAP))
        found = [int(cheap[losses[cheap].argmin()])]
        for i in costs.argsort(kind="stable"):
            if costs[i] > np.quantile(costs, CHEAP) and losses[i] < losses[found[-1]]:
                found.append(int(i))
        return found

    def level(self, losses: np.ndarray, costs: np.ndarray):
        """The loss of the front by the logarithm of the cost, flat beyond its ends."""
        edge = self.front(losses, costs)
        low, high = costs[edge].min(), costs[edge].max()
        if len(edge) < 2 or high == low:
            return lambda cost: np.full(len(cost), losses[edge].min())
        span = high - low
        process = GaussianProcess(((costs[edge] - low) / span)[:, None], losses[edge])
        return lambda cost: process((np.clip(cost, low, high)[:, None] - low) / span)[0]

    def works(self, x: np.ndarray, fit: Fitted) -> np.ndarray:
        """The probability that a run ends well and within the limits."""
        bad = np.array([not o.feasible for o in fit.outcomes])
        if not bad.any():
            return np.ones(len(x))
        mean, deviation = GaussianProcess(fit.x, np.where(bad, 1.0, -1.0))(x)
        return ndtr(-mean / deviation)
