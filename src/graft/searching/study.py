"""One search while it runs: what is asked, what is told, and when it is over."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..comparison import budget as budgets
from ..core.errors import GraftError
from ..runs.configuration import Configuration
from ..runs.store import Record
from .fits import Fits
from .outcome import Outcome, front
from .searchers import Searcher
from .space import Point, Space

VAIN = 500  # points in a row that need no run, after which a searcher is taken to have no other


@dataclass
class Trial:
    """A point, the run that it is, and what came of it; `record` is None where there was no run."""

    point: Point
    configuration: Configuration | None
    outcome: Outcome
    record: Record | None = None


class Study:
    """What engines work on: they take a point from `next`, make its run and give the record to `take`.

    trials    of all points, with those that were refused before a run
    reserved  runs of each of the best at the end
    spent     seconds of runs that were not made now, for one that goes on
    """

    def __init__(
        self, space: Space, searcher: Searcher, common: Configuration, fits: Fits, objectives: Sequence[str], *,
        at_most: int | None, seconds: float | None, reserved: int, jobs: int,
    ):  # fmt: skip
        self.space, self.searcher, self.common, self.fits = space, searcher, common, fits
        self.objectives, self.at_most, self.jobs = objectives, at_most, jobs
        self.seconds, self.reserved, self.begun, self.spent = seconds, reserved, time.monotonic(), 0.0
        self.expected = 0.0
        self.trials: list[Trial] = []
        self.known: dict[str, Outcome] = {}
        self.running: dict[str, Point] = {}

    def short(self, steps: int) -> Configuration:
        """A run of a few steps, of a point that nothing is known against, to learn what runs cost."""
        rng, configuration = np.random.default_rng(0), None
        for _ in range(VAIN):
            try:
                configuration = self.space.configuration(self.space.random(rng), self.common)
            except GraftError:
                continue
            if self.fits.refused(configuration) is None:
                break
        if configuration is None:
            raise GraftError("no point of the space is a run: nothing is adapted in any of them")
        training = {**configuration.training, "steps": min(steps, configuration.training["steps"])}
        return replace(configuration, training=training)

    def elapsed(self) -> float:
        return time.monotonic() - self.begun + self.spent / self.jobs

    def over(self) -> bool:
        """Whether no further run may begin: there are enough, or what is left of the time is for the last ones."""
        if self.at_most is not None and len(self.known) + len(self.running) >= self.at_most:
            return True
        if self.seconds is None:
            return False
        costs = [o.cost for o in self.known.values()] or [self.expected]
        # Any run of several objectives may become a point of the front, which is run again with every seed.
        points = 1 if len(self.objectives) == 1 else len(self.best()) + len(self.running) + 1
        rounds = 1 + -(-self.reserved * points // self.jobs)
        return self.elapsed() + rounds * statistics.fmean(costs) > budgets.SHARE * self.seconds

    def best(self) -> list[Trial]:
        """The best trial within the limits, or those of the Pareto front, by the first objective."""
        fit = [t for t in self.trials if t.record and t.outcome.feasible]
        losses = [t.outcome.losses or () for t in fit]
        if len(self.objectives) > 1:
            return sorted((fit[i] for i in front(losses)), key=lambda t: t.outcome.losses or ())
        return sorted(fit, key=lambda t: (t.outcome.losses, t.record and t.record.metrics["validation"]["loss"]))[:1]

    def next(self) -> tuple[Point, Configuration] | None:
        """A point that needs a run; None where there is none, or the search is over."""
        for _ in range(VAIN):
            if self.over() or (point := self.searcher.ask()) is None:
                return None
            try:
                configuration = self.space.configuration(point, self.common)
                refused = self.fits.refused(configuration)
            except GraftError as error:
                configuration, refused = None, Outcome(None, {}, reason=str(error))
            if configuration and configuration.id in self.running:
                continue  # will be told
            if configuration and not refused and (known := self.known.get(configuration.id)):
                self.searcher.tell(point, known)
            elif refused or configuration is None:
                assert refused
                self.trials.append(Trial(point, configuration, refused))
                self.searcher.tell(point, refused)
            else:
                self.running[configuration.id] = point
                return point, configuration
        return None

    def take(self, record: Record, *, anew: bool, asked: Configuration | None = None) -> Trial:
        """The record of a run that `next` gave; `anew`: it was made now; `asked`: what it was before it changed."""
        c = asked or record.configuration
        point, outcome = self.running.pop(c.id), Outcome.of(record, self.objectives, self.fits.limits)
        self.known[c.id] = outcome
        self.spent += 0.0 if anew else outcome.cost
        self.trials.append(Trial(point, record.configuration, outcome, record))
        self.searcher.tell(point, outcome)
        return self.trials[-1]
