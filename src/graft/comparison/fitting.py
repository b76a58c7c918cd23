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
              learning_rate, tried (rates), step (seconds), compared (whether it goes on)
    """

    steps: int
    unfit: dict[str, str]
    screened: list[dict[str, Any]]


@dataclass
class Fitting:
    """Contestants, one plan each: a configuration a learning rate, the lowest first; and the time for all their runs.

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
        """Every method for a few steps, first with its highest rate, which does most in a few, then the best ones with
        their other rates, for half of the time that the controls leave; of the best ones by the validation loss, as
        many are compared as fit with MORE times these steps."""
        known = [plan for plan in self.trained if name(plan[0]) not in self.unfit]
        controls = [plan for plan in known if plan[0].method in CONTROLS]
        others = {name(plan[0]): plan for plan in known if plan[0].method not in CONTROLS}
        jobs = self.options["jobs"]
        if len(others) < 2:
            raise budget.too_small(all_of_them, self.seconds, self._spent(), jobs)
        (quick,) = self._run("screening", [look(first[0])])
        own, each = _Split.of(trial, quick), quick.seconds["in_all"]
        always = [cost for plan in controls for cost in own.costs(plan, self)]
        always.append(Cost(own.tuning, 0.0, self.untrained * (1 + self.seeds)))
        least = [*always, *own.costs(next(iter(others.values())), self)]
        needs = budget.needed(least, self._enough) + each * len(others)
        if needs > self._left():
            raise budget.too_small(all_of_them, self.seconds, self._spent(), jobs, needs)
        spare = self._left() - budget.needed(least, self._enough)
        until = time.monotonic() + max(spare / 2, each * len(others)) / jobs
        limit = max(SLOW * each, PATIENCE)
        looks = self._run("screening", [look(plan[-1]) for plan in others.values()], limit, until)
        order = {row["method"]: None for row in _ranked(looks)} | {name(r.configuration): None for r in looks if r.done}
        rest = [look(c) for method in order for c in others[method][-2::-1]]
        looks += self._run("screening", rest, limit, until)
        rows, seen = _ranked(looks), {name(r.configuration): r for r in looks}
        placed = {row["method"] for row in rows}
        self._leave_out([r for method, r in seen.items() if method not in placed])
        self.unfit |= dict.fromkeys(others.keys() - seen.keys(), "the time for the screening was over")
        if not rows:
            raise GraftError(f"no method can be trained: {next(iter(self.unfit.values()))}")
        best = others[rows[0]["method"]]
        (tried,) = self._run("short runs", [self._short(best)])
        dear = own.most(_Split.of(tried, seen[name(best[0])]))
        costs = [dear._replace(step=row["step"]).costs(others[row["method"]], self) for row in rows]
        found = 0
        for count in range(len(costs), 0, -1):
            found = self._steps([*always, *(cost for of in costs[:count] for cost in of)])
            if found >= self._enough:
                break
        steps = max(found, min(TRIAL, self._enough))  # what was screened is compared, even if it takes a little longer
        return Fitted(steps, self.unfit, [row | {"compared": n < count} for n, row in enumerate(rows)])

    @property
    def _enough(self) -> int:
        return min(MORE * TRIAL, self.at_most or MORE * TRIAL)

    def _run(
        self, phase: str, wanted: Sequence[Configuration], limit: float | None = None, until: float | None = None
    ) -> list[Record]:
        self.live.expect(phase, wanted)
        return pool.run(wanted, self.store, limit=limit, until=until, **self.options)

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


class _Split(NamedTuple):
    """Seconds beside the steps of a run that tries a rate, and of one that is final, and seconds of a step."""

    tuning: float
    final: float
    step: float

    @classmethod
    def of(cls, short: Record, quick: Record) -> "_Split":
        """From a short run, which measures three splits where others measure two, and one that measures none."""
        fixed, step, _ = Cost.of(short, 0)
        split = short.seconds.get("measuring", 0.0) / 3
        return cls(min(Cost.of(quick, 0).fixed + 2 * split, fixed), fixed - split, step)

    def most(self, other: "_Split") -> "_Split":
        return _Split(max(self.tuning, other.tuning), max(self.final, other.final), self.step)

    def costs(self, plan: Sequence[Configuration], of: Fitting) -> list[Cost]:
        return [Cost(self.tuning, self.step, len(plan)), Cost(self.final, self.step, of.seeds * (1 + of.sizes))]


def training(c: Configuration, **changes: Any) -> Configuration:
    return replace(c, training={**c.training, **changes})


def name(c: Configuration) -> str:
    return title(c.method, c.options)


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
        best.setdefault(row["method"], row | {"tried": sum(other["method"] == row["method"] for other in rows)})
    return list(best.values())
