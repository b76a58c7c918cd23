"""Searchers with Gaussian processes: what they have in common."""

import numpy as np

from .beliefs import Beliefs
from .gaussian import GaussianProcess
from .searchers import Remembering
from .space import Point

FIRST = 4  # points drawn before there is a model


class Modelled(Remembering):
    """Points are drawn until there are enough good outcomes for a model; then `model` chooses. What other tasks say of
    the best point, see `Beliefs`, is what the first points are drawn by, and a dimension of the model.

    Runs without a result count as bad as the worst one that has a result. What is waited for counts as what the model
    says of it (the "Kriging believer" of Ginsbourger et al., 2010), so that several points asked for together differ.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.beliefs = Beliefs(self.space, self.tables)

    def model(self, points: list[Point], x: np.ndarray, fit: "Fitted") -> Point | None:
        """One of these points, whose encodings are x; or None, with a verdict."""
        raise NotImplementedError

    def propose(self, points: list[Point]) -> Point | None:
        if sum(o.losses is not None for _, o in self.told) < FIRST:
            return self.drawn(points)
        return self.model(points, self.encoded(points), Fitted(self))

    def drawn(self, points: list[Point]) -> Point:
        """One of these as likely as it is believed to be the best; without beliefs, the first one."""
        if not self.beliefs:
            return points[0]
        share = self.density(points)
        share = np.exp(share - share.max())
        return points[self.rng.choice(len(points), p=share / share.sum())]

    def density(self, points: list[Point]) -> np.ndarray:
        """Logarithms of what is believed before the search."""
        return np.array([self.beliefs.density(p) for p in points])

    def origins(self) -> list[Point]:
        good = [(p, o) for p, o in self.told if o.losses is not None]
        return [p for p, _ in sorted(good, key=lambda e: (not e[1].feasible, e[1].losses))[:4]]

    def encoded(self, points: list[Point]) -> np.ndarray:
        found = np.stack([self.space.encode(p) for p in points])
        return np.c_[found, [self.beliefs.offset(p) for p in points]] if self.beliefs else found


class Fitted:
    """Models of what a searcher was told."""

    def __init__(self, searcher: Modelled):
        self.points, self.outcomes = [p for p, _ in searcher.told], [o for _, o in searcher.told]
        self.x = searcher.encoded(self.points)
        waiting = list(searcher.waiting.values())
        self.ahead = searcher.encoded(waiting) if waiting else self.x[:0]

    def losses(self, objective: int) -> np.ndarray:
        """Of one objective; what is much worse than the half of them is drawn nearer, for the good ones matter."""
        known = np.array([np.nan if o.losses is None else o.losses[objective] for o in self.outcomes])
        middle = np.nanmedian(known)
        worst = min(np.nanmax(known), middle + 2 * (middle - np.nanmin(known)) or np.nanmax(known))
        return np.minimum(np.where(np.isnan(known), worst, known), worst)

    def of_loss(self, objective: int, *, sparse: bool = False) -> GaussianProcess:
        return self._believing(self.x, self.losses(objective), sparse)

    def of_cost(self) -> GaussianProcess:
        """Of the logarithm of the seconds, of points that had a run."""
        ran = np.array([o.cost > 0 for o in self.outcomes])
        return self._believing(self.x[ran], np.log([o.cost for o in self.outcomes if o.cost > 0]), False)

    def of_limit(self, name: str) -> GaussianProcess | None:
        """Of log(value / limit), where it is known for two points or more."""
        known = [i for i, o in enumerate(self.outcomes) if name in o.over]
        if len(known) < 2:
            return None
        return self._believing(self.x[known], np.array([self.outcomes[i].over[name] for i in known]), False)

    def _believing(self, x: np.ndarray, y: np.ndarray, sparse: bool) -> GaussianProcess:
        found = GaussianProcess(x, y, sparse=sparse)
        if not len(self.ahead):
            return found
        return GaussianProcess(np.r_[x, self.ahead], np.r_[y, found(self.ahead)[0]], sparse=sparse)
