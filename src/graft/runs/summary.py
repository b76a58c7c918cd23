"""Records as rows of a table: one a contestant, with the rule by which a learning rate is chosen."""

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .. import tasks
from .configuration import Configuration
from .contestants import title
from .store import Record


@dataclass(frozen=True)
class Summary:
    """One contestant under one setting.

    setting     what it shares with the others of its table: the configuration without method, rate, seed and splits
    title       the method, with the options that are not the default
    tuning      the runs that tried the rates; final: those at the chosen `rate`, on the test split, one a seed
    at_end      whether a rate was chosen beyond which none was tried
    failures    why runs failed, and how many for this reason
    """

    setting: Configuration
    title: str
    tuning: list[Record]
    final: list[Record]
    rate: float | None
    at_end: bool
    failures: dict[str, int]

    def values(self, metric: str, split: str = "test") -> list[float]:
        """One a seed."""
        return [r.metrics[split][metric] for r in self.final]

    def mean(self, figure: str) -> float | None:
        """Of a figure of the final runs: parameters, adapter_bytes, peak_memory, or one of `Record.seconds`."""
        found = [v for r in self.final if (v := {**vars(r), **r.seconds}.get(figure)) is not None]
        return statistics.fmean(found) if found else None

    def row(self) -> dict[str, Any]:
        """As plain data: means and standard deviations over the seeds."""
        metrics = {name: spread(self.values(name)) for name in measured(self.setting)} if self.final else {}
        figures: dict[str, Any] = {
            k: self.mean(k) for k in ("parameters", "adapter_bytes", "training", "step", "peak_memory")
        }
        return {
            "task": self.setting.task,
            "base": self.setting.model,
            "method": self.title,
            "seeds": [r.configuration.seed for r in self.final],
            "learning_rate": self.rate,
            "at_end_of_grid": self.at_end,
            "learning_rates": rates(self.tuning),
            "test": metrics,
            **figures,
            "failures": self.failures,
        }


def summarise(records: Iterable[Record]) -> list[Summary]:
    """The contestants that records are of, in the order in which they occur."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(_contestant(record.configuration), []).append(record)
    return [_summary(group) for group in groups.values()]


def choose(tuning: Sequence[Record]) -> Record | None:
    """The run with the best first metric of the task on the validation split; where that does not decide, by the loss.

    Of equally good ones that with the lowest rate; runs that failed, and metrics that are no number, do not count.
    """
    done = [r for r in tuning if r.done and not any(math.isnan(v) for v in _worth(r))]
    return max(done, key=lambda r: (*_worth(r), -(_rate(r) or 0.0)), default=None)


def measured(configuration: Configuration) -> list[str]:
    """What a table shows of a task: its own metrics, and the loss."""
    return [*(m.__name__ for m in tasks.find(configuration.task).judged(configuration.knobs)), "loss"]


def rates(records: Iterable[Record]) -> list[float]:
    """The learning rates of runs, each once."""
    return sorted({rate for r in records if (rate := _rate(r)) is not None})


def setting(c: Configuration) -> str:
    """What the contestants of one table share, as a text that is equal for those."""
    left_out = {"method", "options", "targets", "seed", "splits", "also"}
    content = {k: v for k, v in c.plain().items() if k not in left_out}
    content["training"] = {k: v for k, v in content["training"].items() if k != "learning_rate"}
    return json.dumps(content, sort_keys=True)


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """Mean, and standard deviation of the sample where there is more than one value."""
    return {"mean": statistics.fmean(values), "sd": statistics.stdev(values) if len(values) > 1 else None}


def difference(a: Sequence[float], b: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """The interval of Welch for mean(a) - mean(b), for samples of unlike variance.

    d ± t se with se^2 = v_a + v_b, v = s^2 / n, and se^4 / (v_a^2 / (n_a - 1) + v_b^2 / (n_b - 1)) degrees of freedom.
    A single value counts as exact, as that of a base without training is.

    The generalization of 'Student's' problem when several different population variances are involved. Welch, 1947.
    """
    from scipy.stats import t

    d = statistics.fmean(a) - statistics.fmean(b)
    parts = [(statistics.variance(x) / len(x), len(x) - 1) for x in (a, b) if len(x) > 1]
    square = sum(v for v, _ in parts)
    if not square:
        return d, d
    freedom = square**2 / sum(v**2 / n for v, n in parts)
    half = float(t.ppf((1 + confidence) / 2, freedom)) * math.sqrt(square)
    return d - half, d + half


def ties(found: Sequence[Summary], metric: str) -> list[bool]:
    """Whether each contestant cannot be told from the best mean: the interval of the difference holds 0."""
    sign = -1.0 if metric == "loss" else 1.0
    values = [[sign * v for v in s.values(metric)] if s.final else None for s in found]
    known = [v for v in values if v]
    if not known:
        return [False] * len(found)
    best = max(known, key=statistics.fmean)
    return [v is not None and (v is best or difference(best, v)[0] <= 0) for v in values]


def _summary(records: list[Record]) -> Summary:
    first = records[0].configuration
    tuning = [r for r in records if "test" not in r.configuration.splits]
    best = choose(tuning)
    rate = _rate(best) if best else None
    last = [r for r in records if "test" in r.configuration.splits and best and _rate(r) == rate]
    tried, failures = rates(tuning), {}
    for r in (r for r in records if not r.done):
        failures[r.reason or ""] = failures.get(r.reason or "", 0) + 1
    return Summary(
        setting=first, title=title(first.method, first.options), tuning=tuning,
        final=sorted((r for r in last if r.done), key=lambda r: r.configuration.seed), rate=rate,
        at_end=len(tried) > 1 and rate in (tried[0], tried[-1]), failures=failures,
    )  # fmt: skip


def _contestant(c: Configuration) -> str:
    return json.dumps([setting(c), c.plain()["method"], c.plain()["options"], c.plain()["targets"]], sort_keys=True)


def _worth(record: Record) -> tuple[float, ...]:
    found, (deciding, *_) = record.metrics["validation"], measured(record.configuration)
    return (*([found[deciding]] if deciding != "loss" else []), -found["loss"])


def _rate(record: Record) -> float | None:
    return record.configuration.training.get("learning_rate")
