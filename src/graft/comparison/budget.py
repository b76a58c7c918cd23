"""How many steps fit into a time: from short runs that were measured."""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from ..core.errors import GraftError
from ..runs.store import Record

UNITS = {"s": 1, "m": 60, "h": 3600}
TRIAL = 8  # steps of the run which measures what a run costs
SHARE = 0.9  # of the budget that is planned with: no two runs take the same time


def seconds(text: str) -> float:
    """Of "90s", "20m" or "1.5h"."""
    form = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smh])\s*", text)
    if not form or not float(form[1]):
        raise GraftError(f"budget={text!r} is no time: write 90s, 20m or 2h")
    return float(form[1]) * UNITS[form[2]]


class Cost(NamedTuple):
    """What runs of one contestant cost: seconds of each beside its steps, seconds of a step, and how many they are."""

    fixed: float
    step: float
    runs: int

    @classmethod
    def of(cls, trial: Record, runs: int) -> "Cost":
        """From a short run."""
        took = trial.seconds
        return cls(took["in_all"] - took.get("training", 0.0), took.get("step", 0.0), runs)


def steps(costs: Sequence[Cost], available: float, at_most: int | None = None) -> int:
    """The most steps which all runs can take alike within so many seconds of one process after the other.

    sum over contestants of runs (fixed + steps step) <= available
    """
    left, each = available - sum(c.runs * c.fixed for c in costs), sum(c.runs * c.step for c in costs)
    found = max(0, int(left / each)) if each else 0
    return found if at_most is None else min(found, at_most)


def needed(costs: Sequence[Cost], least: int = TRIAL) -> float:
    """Seconds for all runs with so many steps."""
    return sum(c.runs * (c.fixed + least * c.step) for c in costs)


def too_small(
    costs: Sequence[Cost], available: float, spent: float, jobs: int, screening: float = math.inf
) -> GraftError:
    """What one run costs, and what would do: TRIAL steps for all, or the seconds that a screening needs."""
    one, all_alike = max(costs, key=lambda c: c.fixed), needed(costs)
    needs = (min(all_alike, screening) / jobs + spent) / SHARE
    what = f"for {TRIAL} steps" if all_alike <= screening else "to screen the methods and compare the best one"
    return GraftError(
        f"the budget of {available:g} s is too small: one run takes {one.fixed:.1f} s and {one.step:.2g} s for each "
        f"step, and there are {sum(c.runs for c in costs)}: {words(needs)} would do {what}; or name fewer "
        "methods, learning rates or seeds"
    )


def words(duration: float) -> str:
    """A time as `seconds` reads it, rounded up."""
    if duration < 120:
        return f"{int(duration) + 1}s"
    return f"{int(duration / 60) + 1}m" if duration < 7200 else f"{int(duration / 360 + 1) / 10:g}h"
