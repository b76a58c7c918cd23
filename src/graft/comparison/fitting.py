"""How many steps fit into a budget, from short runs; and where it is too small for all contestants, who gets them."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from ..core.errors import GraftError
from ..runs import pool
from ..runs.configuration import Configuration
from ..runs.contestants import title
from ..runs.single import CONTROLS, UNTRAINED
from ..runs.store import Record
from . import budget
from .budget import TRIAL, Cost
from .live import Live

MORE = 4  # times the steps of a short run, at least, for those that are compared after a screening
ROWS = 128  # of the validation split that a screening measures, at most
SLOW, PATIENCE = (
    10,
    20.0,
)  # a screening run ends at so many times the time of full fine-tuning, not before so many seconds


class Fitted(NamedTuple):
    """steps     of every run
    unfit     contestants that failed, and why
    screened  one row a contestant that was screened, the best one first: method, loss (validation, at the best rate),
              learning_rate, step (seconds), compared (whether it goes on)
    """

    steps: int
    unfit: dict[str, str]
    screened: list[dict[str, Any]]


@dataclass
class Fitting:
    """Contestants, one plan each: a configuration a learning rate; and the time for all their runs.

    also, seeds, sizes  what a final run measures beside the metrics, how many there are, and how often with fewer rows
    seconds, at_most    the budget, counted from `begun` (of `time.monotonic`), and the most steps that are wanted
    """

    plans: Sequence[Sequence[Configuration]]
    also: Mapping[str, Any]
    seeds: int
    sizes: int
    seconds: float
    at_most: int | None
    begun: float
    store: Path
    options: Mapping[str, Any]
    live: Live

    def __post_init__(self):
        trained = [plan for plan in self.plans if plan[0].method not in UNTRAINED]
        self.trained = sorted(trained, key=lambda plan: plan[0].method != "full-fine-tuning")
        self.untrained = len(self.plans) - len(trained)
        self.unfit: dict[str, str] = {}

    def fitted(self) -> Fitted:
        """All contestants alike, where at least `budget.TRIAL` steps fit; else those that a screening leaves.

        Raises `GraftError` where neither fits, and says which budget would do.
        """
        first, trial = self._first()
        rest = [plan for plan in self.trained if name(plan[0]) not in self.unfit and plan is not first]
        least = min(TRIAL, self.at_most or TRIAL)
        costs = self._costs(Cost.of(trial, 0), [first, *rest])
        if self._steps(costs) >= least:
            found = self._run("short runs", [self._short(plan) for plan in rest])
            self._leave_out([r for r in found if not r.done])
            known = [Cost.of(r, self._count(plan)) for r, plan in zip(found, rest) if r.done]
            costs = [*self._costs(Cost.of(trial, 0), [first]), *known]
            if (steps := self._steps(costs)) >= least:
                return Fitted(steps, self.unfit, [])
        return self._screened(first, trial, costs)

    def _first(self) -> tuple[Sequence[Configuration], Record]:
        """A contestant that can be trained, full fine-tuning if possible, and its short run."""
        for plan in self.trained:
            (record,) = self._run("short runs", [self._short(plan)])
            if record.done:
                return plan, record
            self._leave_out([record])
        raise GraftError(f"no contestant can be trained: {next(iter(self.unfit.values()))}")

    def _screened(self, first: Sequence[Configuration], trial: Record, all_of_them: Sequence[Cost]) -> Fitted:
        """Every method with each of its rates for a few steps; of the best ones by the validation loss, as many are
        compared as fit with MORE times these steps."""
        known = [plan for plan in self.trained if name(plan[0]) not in self.unfit]
        controls = [plan for plan in known if plan[0].method in CONTROLS]
        others = [plan for plan in known if plan[0].method not in CONTROLS]
        cost, jobs = Cost.of(trial, 0), self.options["jobs"]
        if len(others) < 2:
            raise budget.too_small(all_of_them, self.seconds, self._spent(), jobs)
        (quick,) = self._run("screening", [look(first[0])])
        each = quick.seconds["in_all"]
        needs = each * sum(map(len, others)) + budget.needed(self._costs(cost, [*controls, others[0]]), self._enough)
        if needs > self._left():
            raise budget.too_small(all_of_them, self.seconds, self._spent(), jobs, needs)
        limit = max(SLOW * each, PATIENCE)
        looks = self._run("screening", [look(_usual(plan)) for plan in others], limit)
        alive = [plan for plan, record in zip(others, looks) if record.done]
        looks += self._run("screening", [look(c) for plan in alive for c in plan if c != _usual(plan)], limit)
        rows = _ranked(looks)
        placed = {row["method"] for row in rows}
        self._leave_out([r for r in looks if name(r.configuration) not in placed])
        if not rows:
            raise GraftError(f"no method can be trained: {next(iter(self.unfit.values()))}")
        by_name = {name(plan[0]): plan for plan in others}
        ranked = [by_name[row["method"]] for row in rows]
        (tried,) = self._run("short runs", [self._short(ranked[0])])
        dear = max(cost.fixed, Cost.of(tried, 0).fixed)
        costs = [Cost(dear, row["step"], self._count(plan)) for row, plan in zip(rows, ranked)]
        shared = self._costs(cost, controls)
        fit = (n for n in range(len(costs), 1, -1) if self._steps([*shared, *costs[:n]]) >= self._enough)
        count = next(fit, 1)
        if not (steps := self._steps([*shared, *costs[:count]])):
            raise budget.too_small([*shared, *costs[:1]], self.seconds, self._spent(), jobs)
        return Fitted(steps, self.unfit, [row | {"compared": n < count} for n, row in enumerate(rows)])

    @property
    def _enough(self) -> int:
        return min(MORE * TRIAL, self.at_most or MORE * TRIAL)

    def _run(self, phase: str, wanted: Sequence[Configuration], limit: float | None = None) -> list[Record]:
        self.live.expect(phase, wanted)
        return pool.run(wanted, self.store, limit=limit, **self.options)

    def _leave_out(self, records: Sequence[Record]) -> None:
        self.unfit |= {name(r.configuration): r.reason or "its loss is not a number" for r in records}

    def _short(self, plan: Sequence[Configuration]) -> Configuration:
        return training(replace(plan[0], splits=("train", "validation", "test"), also=self.also), steps=TRIAL)

    def _count(self, plan: Sequence[Configuration]) -> int:
        return len(plan) + self.seeds * (1 + self.sizes)

    def _costs(self, like: Cost, plans: Sequence[Sequence[Configuration]]) -> list[Cost]:
        """Of plans, as if each cost what one of them does, and of what is not trained."""
        still = Cost(like.fixed, 0.0, self.untrained * (1 + self.seeds))
        return [*(like._replace(runs=self._count(plan)) for plan in plans), still]

    def _spent(self) -> float:
        return time.monotonic() - self.begun

    def _left(self) -> float:
        """Seconds, of one process after the other."""
        return (budget.SHARE * self.seconds - self._spent()) * self.options["jobs"]

    def _steps(self, costs: Sequence[Cost]) -> int:
        return budget.steps(costs, self._left(), self.at_most)


def training(c: Configuration, **changes: Any) -> Configuration:
    return replace(c, training={**c.training, **changes})


def name(c: Configuration) -> str:
    return title(c.method, c.options)


def _usual(plan: Sequence[Configuration]) -> Configuration:
    """The run at the rate in the middle."""
    return plan[len(plan) // 2]


def look(c: Configuration) -> Configuration:
    """A few steps, and nothing but the loss on a part of the validation split."""
    return training(replace(c, splits=(), rows=min(c.rows, ROWS), also={"points": 1}), steps=TRIAL)


def _ranked(looks: Sequence[Record]) -> list[dict[str, Any]]:
    """A row for each contestant, at its best rate; the best one first."""
    rows = [
        {"method": name(r.configuration), "loss": loss, "learning_rate": r.configuration.training["learning_rate"],
         "step": r.seconds["step"]}
        for r in looks
        if r.done and math.isfinite(loss := r.figures["validation"][-1][2])
    ]  # fmt: skip
    best: dict[str, dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: (row["loss"], row["method"])):
        best.setdefault(row["method"], row)
    return list(best.values())
