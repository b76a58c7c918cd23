"""How the loss falls with training rows or compute, and what that says of more than anybody trained with yet.

Selecting Large Language Model to Fine-tune via Rectified Scaling Law. Lin et al., 2024.
https://arxiv.org/abs/2402.02314 (formulas from its project page, the algorithm from its authors' code)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .core.errors import GraftError

ACCEPT, DELTA = 3, 5.0  # points that are accepted unseen; standard deviations that make the next one an outlier


@dataclass(frozen=True)
class Rectified:
    """L(D) = B / (D_l + D^beta) + E, D rows.

    `learnt` is D_l, what pre-training is worth in rows (to the power of beta): the loss is flat until D^beta is of its
    size (the pre-power phase), and a power law beyond; 0 is the plain law B / D^beta + E.
    """

    B: float
    learnt: float
    beta: float
    E: float

    def __call__(self, rows: float | np.ndarray) -> float | np.ndarray:
        return self.B / (self.learnt + np.asarray(rows, float) ** self.beta) + self.E

    @classmethod
    def fit(cls, rows: Sequence[float], losses: Sequence[float], *, plain: bool = False) -> "Rectified":
        """The least squares of log L over several starts, all parameters at least 0; `plain`: with D_l = 0.

        Needs as many points as the law has parameters, 4 (3), and losses above 0.
        """
        from scipy.optimize import least_squares

        x, y = _checked(rows, losses, 3 if plain else 4)
        top = float(np.exp(y.max()))

        def law(p: np.ndarray) -> np.ndarray:
            # log A, log D_l, log beta, log E: the loss without rows is A + E
            level, learnt, beta, rest = np.exp(p)
            grown = np.exp(beta * x)
            return np.log((level / (1 + grown / learnt)) + rest) if not plain else np.log(level / grown + rest)

        found = None
        for beta in (0.1, 0.3, 0.6, 1.0):
            for half in np.exp(beta * np.quantile(x, [0.1, 0.5, 0.9])):
                for share in (0.05, 0.5):
                    start = np.log([top if not plain else top * np.exp(beta * x.min()), half, beta, share * top])
                    tried = least_squares(lambda p: law(p) - y, start, bounds=(-30.0, 30.0), max_nfev=400)
                    if found is None or tried.cost < found.cost:
                        found = tried
        assert found is not None
        level, learnt, beta, rest = map(float, np.exp(found.x))
        return cls(level, 0.0, beta, rest) if plain else cls(level * learnt, learnt, beta, rest)


class Line(NamedTuple):
    """log y = intercept + slope log x, and on how many points it rests."""

    intercept: float
    slope: float
    accepted: int

    def __call__(self, x: float) -> float:
        return float(np.exp(self.intercept + self.slope * np.log(x)))


def accept_then_stop(
    rows: Sequence[float], losses: Sequence[float], *, accept: int = ACCEPT, delta: float = DELTA
) -> Line:
    """The line through the power phase of a loss curve, in log-log space.

    From the largest size downwards, `accept` points are taken unseen. The next smaller one is taken while

        |log L - line(log D)| <= delta sd(residuals of the line through those taken)

    and ends it otherwise: it lies in the flat phase before. rows, losses: one a size, in any order.
    """
    x, y = _checked(rows, losses, min(accept, 2))
    order = np.argsort(-x)
    x, y, taken = x[order], y[order], min(accept, len(x))
    while True:
        slope, intercept = np.polyfit(x[:taken], y[:taken], 1)
        if taken == len(x) or _outlier(x, y, taken, slope, intercept, delta):
            return Line(float(intercept), float(slope), taken)
        taken += 1


class Frontier(NamedTuple):
    """The best run at each compute, extended: its loss, and the size of its model."""

    loss: Line
    size: Line


def frontier(compute: Sequence[float], sizes: Sequence[float], losses: Sequence[float]) -> Frontier:
    """Lines in log-log space through the runs with the lowest loss at each compute: log L and log N over log C.

    compute, sizes, losses: one a run, several runs at each of two values of the compute or more.
    """
    _checked(compute, losses, 2)
    best: dict[float, tuple[float, float]] = {}
    for c, n, loss in zip(compute, sizes, losses):
        best[c] = min(best.get(c, (loss, n)), (loss, n))
    x, y = np.log([*best]), np.log([*best.values()])
    (loss, size), (loss_0, size_0) = np.polyfit(x, y, 1)
    return Frontier(Line(float(loss_0), float(loss), len(best)), Line(float(size_0), float(size), len(best)))


def _outlier(x: np.ndarray, y: np.ndarray, taken: int, slope: float, intercept: float, delta: float) -> bool:
    spread = float(np.std(y[:taken] - (intercept + slope * x[:taken])))
    off = abs(y[taken] - (intercept + slope * x[taken]))
    return bool(off > delta * max(spread, 1e-9))  # points that lie on a line have no spread but rounding


def _checked(rows: Sequence[float], losses: Sequence[float], least: int) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(rows, float), np.asarray(losses, float)
    if len(x) != len(y) or len(set(x.tolist())) < least:
        raise GraftError(f"a law needs {least} sizes with a loss each, there are {len(set(x.tolist()))}")
    if not (np.isfinite(y).all() and (y > 0).all() and (x > 0).all()):
        raise GraftError(f"sizes and losses must be above 0: {list(rows)}, {list(losses)}")
    return np.log(x), np.log(y)
