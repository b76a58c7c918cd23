"""What a run was worth: objectives, all of which are to be as small as can be, and limits."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..core.errors import GraftError
from ..runs.limits import UNITS
from ..runs.store import Record
from ..runs.summary import measured

BYTES = {unit.lower(): count for unit, count in UNITS.items()}


def _quality(record: Record) -> float:
    """The first metric of the task on the validation split, more being better; of a task without one the loss."""
    name = measured(record.configuration)[0]
    found = record.metrics["validation"][name]
    return found if name == "loss" else -found


FIGURES: dict[str, Callable[[Record], float | None]] = {
    "parameters": lambda r: r.parameters,
    "memory": lambda r: r.peak_memory,
    "seconds": lambda r: r.seconds.get("training"),
    "saved": lambda r: r.adapter_bytes,
}
OBJECTIVES: dict[str, Callable[[Record], float | None]] = {
    "quality": _quality,
    "loss": lambda r: r.metrics["validation"]["loss"],
    **FIGURES,
}


@dataclass(frozen=True)
class Outcome:
    """Of one point.

    losses  of each objective, less being better; None where there was no good run
    over    of each limit log(value / limit), above 0 where it is not kept to; of limits whose value is known
    cost    seconds that it took
    reason  why there was no run, or no good one
    """

    losses: tuple[float, ...] | None
    over: Mapping[str, float]
    cost: float = 0.0
    reason: str | None = None

    @property
    def feasible(self) -> bool:
        return self.losses is not None and all(v <= 0 for v in self.over.values())

    @classmethod
    def of(cls, record: Record, objectives: Sequence[str], limits: Mapping[str, float]) -> "Outcome":
        """From a record."""
        cost = record.seconds.get("in_all", 0.0)
        if not record.done:
            return cls(None, {}, cost, record.reason)
        losses = [OBJECTIVES[name](record) for name in objectives]
        beyond = {k: over(v, limit) for k, limit in limits.items() if (v := FIGURES[k](record)) is not None}
        if bad := next((n for n, v in zip(objectives, losses) if v is None or not math.isfinite(v)), None):
            return cls(None, beyond, cost, f"its {bad} is no finite number")
        return cls(tuple(map(float, losses)), beyond, cost)  # type: ignore


def over(value: float, limit: float) -> float:
    """log(value / limit)."""
    return math.log(max(value, 1e-9) / limit)


def checked(objectives: Sequence[str]) -> tuple[str, ...]:
    """The objectives, if they are known and each named once."""
    names = (objectives,) if isinstance(objectives, str) else tuple(objectives)
    if not names or len(set(names)) < len(names):
        raise GraftError("objective needs names, each once: quality, or quality,parameters")
    if unknown := next((n for n in names if n not in OBJECTIVES), None):
        raise GraftError(f"there is no objective {unknown!r}; there are {', '.join(OBJECTIVES)}")
    return names


def limits(given: Mapping[str, Any] | None) -> dict[str, float]:
    """Limits as numbers; of memory and what is saved, "1GiB" is a number of bytes."""
    found = {}
    for name, value in (given or {}).items():
        if name not in FIGURES:
            raise GraftError(f"there is no limit {name!r}; there are {', '.join(FIGURES)}")
        form = re.fullmatch(r"\s*([\d.]+(?:e\d+)?)\s*([a-z]*)\s*", str(value).lower())
        units = BYTES if name in ("memory", "saved") else {"": 1}
        if not form or form[2] not in units or not float(form[1]) > 0:
            example = "1GiB" if len(units) > 1 else "100000" if name == "parameters" else "60"
            raise GraftError(f"at_most: {name}={value} is no limit: write {name}={example}")
        found[name] = float(form[1]) * units[form[2]]
    return found


def front(losses: Sequence[tuple[float, ...]]) -> list[int]:
    """The places of those which no other is at least as good as in all and better in one; of equal ones the first."""
    return [i for i, a in enumerate(losses) if not any(_before(b, a) for b in losses) and losses.index(a) == i]


def _before(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a != b and all(x <= y for x, y in zip(a, b))
