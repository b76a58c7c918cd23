"""What the runs of a comparison say: a row for each contestant, with how sure it is."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..runs.single import CONTROLS
from ..runs.store import Record
from ..runs.summary import Summary, difference, measured, spread
from .guard import Thresholdout

COSTS = (
    "parameters",
    "peak_memory",
    "step",
    "time_to_target",
    "adapter_bytes",
    "latency",
    "latency_merged",
    "forgetting",
)


def rows(found: Sequence[Summary], target: float | None = None) -> list[dict[str, Any]]:
    """One for each contestant: `Summary.row`, and beside that

    control            whether it is one of the controls
    deciding           the metric that decides: the first one of the task, or the loss; of all rows the same
    not_above          the controls that its mean is not shown to beat: the 95 % interval of the difference holds 0 or
                       lies below, or there is one seed only
    tie                whether it cannot be told from the best mean
    time_to_target     seconds of training until the validation loss was `target` or less, at the measured points, mean
                       over the seeds; None if one of them never got there; reached: how many did
    latency, latency_merged  seconds of a forward pass over one batch
    forgetting         loss on other data after minus before
    validation_loss    at the end
    guarded            the choice of the rate through `Thresholdout`, where the metric lies between 0 and 1
    pareto             the costs for which no contestant is better and not dearer
    """
    if not found:
        return []
    deciding = measured(found[0].setting)[0]
    before = next((_mean(s, _forgotten) for s in found if s.setting.method == "no-op"), None)
    sure = [beaten(s, found, deciding) for s in found]
    made = []
    for s, not_above in zip(found, sure):
        times = [time_to(r, target) for r in s.final]
        after = _mean(s, _forgotten)
        made.append({
            **s.row(),
            "control": s.setting.method in CONTROLS,
            "deciding": deciding,
            "quality": _quality(s, deciding),
            "not_above": not_above,
            "time_to_target": None if None in times or not times else statistics.fmean(times),  # type: ignore
            "reached": sum(t is not None for t in times),
            "latency": _mean(s, lambda r: r.figures.get("latency", {}).get("unmerged")),
            "latency_merged": _mean(s, lambda r: r.figures.get("latency", {}).get("merged")),
            "forgetting": None if None in (after, before) else after - before,  # type: ignore
            "validation_loss": spread(_losses(s)) if s.final else None,
            "guarded": guarded(s, deciding),
        })  # fmt: skip
    for row, tie, fronts in zip(made, tied(found, deciding), fronts_of(made)):
        row |= {"tie": tie, "pareto": fronts}
    return made


def end_of(found: Sequence[Summary]) -> float | None:
    """The last point of the validation loss of full fine-tuning, of its seeds the largest: each of them reached it."""
    full = [r for s in found if s.setting.method == "full-fine-tuning" for r in s.final]
    ends = [r.figures["validation"][-1][2] for r in full if r.figures.get("validation")]
    return max(ends, default=None)


def time_to(record: Record, target: float | None) -> float | None:
    """Seconds of training until the validation loss was `target` or less; None if it never was."""
    curve = record.figures.get("validation", [])
    return next((spent for _, spent, loss in curve if target is not None and loss <= target), None)


def beaten(s: Summary, found: Sequence[Summary], metric: str) -> list[str]:
    """The controls that a contestant is not shown to beat."""
    own, sign = s.values(metric) if s.final else [], -1.0 if metric == "loss" else 1.0
    missed = []
    for control in found:
        if control is s or control.setting.method not in CONTROLS or not control.final:
            continue
        other = control.values(metric)
        sure = len(own) > 1 and difference([sign * v for v in own], [sign * v for v in other])[0] > 0
        if not sure:
            missed.append(control.title)
    return missed


def tied(found: Sequence[Summary], metric: str) -> list[bool]:
    """Whether each contestant cannot be told from the best mean; with one seed nothing trained can be told apart."""
    sign = -1.0 if metric == "loss" else 1.0
    values = [[sign * v for v in s.values(metric)] if s.final else [] for s in found]
    best = max((v for v in values if v), key=statistics.fmean, default=[])

    def alike(v: list[float], s: Summary) -> bool:
        single = (s.rate is not None and len(v) < 2) or len(best) < 2
        return bool(v) and (v is best or single or difference(best, v)[0] <= 0)

    return [alike(v, s) for v, s in zip(values, found)]


def guarded(s: Summary, metric: str) -> dict[str, Any] | None:
    """The learning rate that the guard chooses, and the score that it gives for it, beside the plain choice.

    None where there is no metric from 0 to 1, or nothing to choose.
    """
    done = [r for r in s.tuning if r.done and "train" in r.metrics and s.rate is not None]
    scores = {r.configuration.training["learning_rate"]: r for r in done}
    if metric == "loss" or len(scores) < 2 or s.rate not in scores:
        return None
    pairs = {k: (r.metrics["train"][metric], r.metrics["validation"][metric]) for k, r in sorted(scores.items())}
    if any(not 0 <= v <= 1 for pair in pairs.values() for v in pair):
        return None
    guard = Thresholdout(s.setting.rows, seed=s.setting.seed)
    answers = {rate: guard(*pair) for rate, pair in pairs.items()}
    best = max(answers, key=lambda rate: (answers[rate], -scores[rate].metrics["validation"]["loss"], -rate))
    return {
        "learning_rate": best,
        "score": answers[best],
        "plain_learning_rate": s.rate,
        "plain_score": pairs[s.rate][1],
        "tolerance": guard.tolerance,
    }


def fronts_of(made: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """For each row the costs on whose Pareto front it is: no other is at least as good and as cheap, and one of both
    more so."""
    return [
        [cost for cost in COSTS if _is(row, cost) and not any(_dominates(o, row, cost) for o in made if _is(o, cost))]
        for row in made
    ]


def predicts(found: Sequence[Summary]) -> dict[str, Any] | None:
    """Spearman's rank correlation of the validation loss, less is better, with the deciding metric on the test split,
    over all final runs; None for less than three runs or where one of both is constant.

    Astraios: Parameter-Efficient Instruction Tuning Code Large Language Models. Zhuo et al., 2024.
    https://arxiv.org/abs/2401.00788
    """
    from scipy.stats import spearmanr

    if not found:
        return None
    metric = measured(found[0].setting)[0]
    pairs = [(-r.metrics["validation"]["loss"], r.metrics["test"][metric]) for s in found for r in s.final]
    pairs = [(a, -b if metric == "loss" else b) for a, b in pairs if math.isfinite(a) and math.isfinite(b)]
    if len(pairs) < 3 or any(len(set(column)) < 2 for column in zip(*pairs)):
        return None
    ranked: Any = spearmanr([a for a, _ in pairs], [b for _, b in pairs])
    return {"metric": metric, "runs": len(pairs), "rank_correlation": float(ranked.statistic)}


def _quality(s: Summary, metric: str) -> float | None:
    """The mean of the deciding metric, more is better."""
    if not s.final:
        return None
    mean = statistics.fmean(s.values(metric))
    return -mean if metric == "loss" else mean


def _is(row: Mapping[str, Any], cost: str) -> bool:
    return row.get(cost) is not None and row["quality"] is not None and math.isfinite(row["quality"])


def _dominates(a: Mapping[str, Any], b: Mapping[str, Any], cost: str) -> bool:
    return a["quality"] >= b["quality"] and a[cost] <= b[cost] and (a["quality"], a[cost]) != (b["quality"], b[cost])


def _mean(s: Summary, figure: Callable[[Record], float | None]) -> float | None:
    values = [v for r in s.final if (v := figure(r)) is not None]
    return statistics.fmean(values) if values else None


def _forgotten(record: Record) -> float | None:
    return record.figures.get("forgetting")


def _losses(s: Summary) -> list[float]:
    return s.values("loss", "validation")
