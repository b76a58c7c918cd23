"""What the tables of other tasks say of where the best point of a space is."""

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from ..evidence import REFERENCES
from .space import Point, Space


class Beliefs:
    """From tables as `graft.evidence.tables` gives them: of each method the learning rate that was best in each table,
    and whether it could be told from the best there. The density of the best point is, up to a factor,

        pi(x) = q / (s (1 + u^2))   where   u = (log10(rate) - m) / s

    with q, m and s of its method: a Cauchy density, whose tails are heavy, for other models than those measured may
    want very different rates. For a method that is in n tables m is the mean of its log10(rate), and
    s^2 = v (1 + 1/n) with v the variance within methods, the same for all. For one that is in none m is the mean over
    the k methods, and s^2 = b (1 + 1/k) + v with b the variance between their means. q = (ties + 1) / (n + 2); for one
    that is in none, the mean over the methods. A chain has the means over its methods. Full fine-tuning and the other
    references count as no method.

    Tables in which no method has two different rates, or which have one method only, say nothing: pi is 1 everywhere.
    """

    def __init__(self, space: Space, tables: Sequence[Mapping[str, Any]]):
        self.space, self.known, self.other, self.within = space, {}, (0.0, 0.0, 1.0), 0.0
        rows = defaultdict[str, list[Mapping]](list)
        for row in (row for table in tables for row in table["rows"] if row["method"] not in REFERENCES):
            rows[row["method"]].append(row)
        rates = {name: [math.log10(r["learning_rate"]) for r in found] for name, found in rows.items()}
        means = {name: statistics.fmean(found) for name, found in rates.items()}
        squares = sum((rate - means[name]) ** 2 for name, found in rates.items() for rate in found)
        if not squares or len(rates) < 2:
            return
        self.within = squares / (sum(map(len, rates.values())) - len(rates))
        for name, found in rows.items():
            n, ties = len(found), sum(r["tie"] for r in found)
            self.known[name] = means[name], self.within * (1 + 1 / n), (ties + 1) / (n + 2)
        self.other = (
            statistics.fmean(means.values()),
            statistics.variance(means.values()) * (1 + 1 / len(means)) + self.within,
            statistics.fmean(q for _, _, q in self.known.values()),
        )

    def __bool__(self) -> bool:
        return bool(self.known)

    def density(self, point: Point) -> float:
        """log pi, less the same number for all points."""
        mean, variance, q = self._of(point)
        if not variance or "learning_rate" not in point:
            return math.log(q)
        squared = (math.log10(point["learning_rate"]) - mean) ** 2 / variance
        return math.log(q) - 0.5 * math.log(variance) - math.log1p(squared)

    def offset(self, point: Point) -> float:
        """log10 of the learning rate less that which is usual for the method, in deviations within methods: a rate that
        is high for one method on a task is most often high for the others too."""
        mean, variance, _ = self._of(point)
        if not variance or "learning_rate" not in point:
            return 0.0
        return (math.log10(point["learning_rate"]) - mean) / math.sqrt(self.within)

    def _of(self, point: Point) -> tuple[float, float, float]:
        """m, s^2 and q."""
        members = self.space.alternatives[point["method"]].members
        every = [self.known.get(m.name, self.other) for m in members] or [self.other]
        mean, variance, q = (statistics.fmean(values) for values in zip(*every))
        return mean, variance, q
