"""Which methods to try, from what was measured on other tasks, without training anything.

graft.advise("graft:minilm", "reviews.csv", parameters=100_000)
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from . import bases, evidence
from .core.delta import METHODS
from .core.errors import GraftError
from .core.hyper import Range
from .core.names import SHIPPED
from .models import Base, architecture, load_base
from .prediction import predict_cost
from .runs import limits
from .runs.single import UNTRAINED
from .training import objectives
from .training.data import read
from .training.evaluation import choose
from .tuning import trained

SHARE = 0.5  # of the tables that tell methods apart: what stands in fewer is not ranked
FAR = 10  # times the largest base or the most rows measured, beyond which it is said that nothing is known
# What papers report and this project has not measured, by objective.
REPORTED = {
    "causal-lm": (
        "with few rows, methods with few parameters need more steps than full fine-tuning until they converge",
        "Empirical Analysis of the Strengths and Weaknesses of PEFT Techniques for LLMs. Pu et al., 2023.",
    ),
}


@dataclass(frozen=True)
class Recommendation:
    """One method to try.

    method         with its default hyperparameters
    learning_rate  to begin with: the middle one of those that were best, or None for what is not trained
    tied, of       in how many tables it cannot be told from the best, of those which tell methods apart and have it
    quality        mean over these tables of (its score - floor) / (the best one's - floor); see `advise`
    parameters     trained, on the model; None without a model. adapter_bytes: of the file, with 4 bytes a number
    step, kept     time of a step and bytes kept for backward, as multiples of LoRA's; None where not measured
    evidence       a line for each table
    """

    method: str
    learning_rate: float | None
    tied: int
    of: int
    quality: float
    parameters: int | None
    adapter_bytes: int | None
    step: float | None
    kept: float | None
    evidence: list[str]


@dataclass(frozen=True)
class Advice:
    """What `advise` found: the best recommendation first, none where nothing is known.

    objective  what the data are for
    unknown    what the evidence does not cover, in sentences
    left_out   methods that the limits exclude, and why
    reported   what papers say and was not measured here: (claim, source)
    """

    objective: str
    recommendations: list[Recommendation]
    unknown: list[str]
    left_out: dict[str, str] = field(default_factory=dict)
    reported: list[tuple[str, str]] = field(default_factory=list)


def advise(
    model: Annotated[str | None, "a folder, the id of a model on the hub, or graft:NAME; it is not trained"] = None,
    data: Annotated[Any, "task:NAME, a file, a folder, owner/name on the hub, or a list of dicts"] = None,
    *,
    objective: Annotated[str | None, "what is to be learned, where there are no data: classification, ..."] = None,
    rows: Annotated[int | None, "of the train split, where there are no data", Range(1)] = None,
    columns: Annotated[Mapping | None, "{name that is needed: name in the data}"] = None,
    parameters: Annotated[int | None, "trained ones at most; needs a model", Range(1)] = None,
    memory: Annotated[
        str | None, "what the tensors of a run may take, such as 2GiB, with the defaults of tune; needs model and data"
    ] = None,
    mergeable: Annotated[bool, "only what can be merged into the base"] = False,
    slower: Annotated[float | None, "time of a step at most, as a multiple of LoRA's", Range(above=0)] = None,
    count: Annotated[int, "how many methods to name", Range(1)] = 5,
) -> Advice:
    """Rank methods by what the committed tables say of tasks with the same objective; nothing is trained.

    Evidence are the reference runs (`graft.evidence.tables`): tuned learning rates, several seeds. A table counts if it
    tells at least two methods apart and the best mean is above the floor. Ranked is by the share of these tables in
    which a method cannot be told from the best mean (95 % interval of Welch), then by the mean over them of

        quality = (score - floor) / (best score - floor)

    with the first metric of the task, floor: always the commonest answer; of the loss (best loss / loss). What stands
    in less than half of the tables is not ranked. Where the objective was never measured there is no recommendation.

    Memory is that of tensors, which `graft.predict_cost` foretells for the methods that come first.

    Raises `GraftError` for an unknown model, data or objective, neither data nor objective, and limits that need a
    model.
    """
    if data is None and objective is None:
        raise GraftError("advice needs data, or an objective: classification, causal-lm, ...")
    allowed = None if memory is None else limits.size(memory)
    if allowed is not None and (model is None or data is None):
        raise GraftError(f"memory={memory} at most: that depends on the model and the data: name both")
    if parameters is not None and model is None:
        raise GraftError(f"parameters={parameters} at most: that depends on the model: name one")
    examples = None if data is None else read(data, columns=columns)
    rows = rows if examples is None else len(examples)
    if objective is None:
        objective = choose("auto", examples, "" if model is None else architecture(model)).name
    objectives.find(objective)
    base = None if model is None else load_base(model, objective=objective, examples=examples)
    tables = [t for t in evidence.tables() if t["objective"] == objective]
    telling = [t for t in tables if _tells(t)]
    if not telling:
        known = sorted({t["objective"] for t in evidence.tables()})
        return Advice(objective, [], [
            f"nothing was measured for {objective}, only for {', '.join(known)}: graft compare measures it on your data"
        ])  # fmt: skip
    found, left_out = [], {}
    for name in dict.fromkeys(r["method"] for t in telling for r in t["rows"]):
        held = [(t, r) for t in telling for r in t["rows"] if r["method"] == name]
        if name in UNTRAINED or len(held) < SHARE * len(telling):
            continue
        try:
            size = None if base is None else trained(base, limits.CONTROLS.get(name, name))
        except GraftError as error:
            left_out[name] = str(error)
            continue
        made = _recommendation(name, held, size)
        if why := _excluded(made, parameters, mergeable, slower):
            left_out[name] = why
        else:
            found.append(made)
    found.sort(key=lambda r: (-r.tied / r.of, -r.quality))
    kept = []
    for r in found:
        if len(kept) == count:
            break
        if why := None if base is None or allowed is None else _too_large(base, examples, r.method, allowed):
            left_out[r.method] = why
        else:
            kept.append(r)
    return Advice(
        objective, kept, _unknown(telling, tables, base, rows), left_out,
        [REPORTED[objective]] if objective in REPORTED else [],
    )  # fmt: skip


def score(table: Mapping[str, Any], row: Mapping[str, Any]) -> float:
    """The quality of a row among those of its table: 0 for the floor, 1 for the best mean."""
    metric = next(iter(row["test"]))
    means = [r["test"][metric]["mean"] for r in table["rows"]]
    own = row["test"][metric]["mean"]
    if metric == "loss":
        return min(means) / own
    floor = table["floor"].get(metric, 0.0)
    return (own - floor) / (max(means) - floor)


def _tells(table: Mapping[str, Any]) -> bool:
    metric = next(iter(table["rows"][0]["test"]))
    best = max(r["test"][metric]["mean"] for r in table["rows"])
    return not all(r["tie"] for r in table["rows"]) and (metric == "loss" or best > table["floor"].get(metric, 0.0))


def _recommendation(name: str, held: Sequence[tuple], size: int | None) -> Recommendation:
    rates = sorted(r["learning_rate"] for _, r in held if r["learning_rate"] is not None)
    cost = evidence.costs().get(name, {})
    return Recommendation(
        method=name, learning_rate=statistics.median_low(rates) if rates else None,
        tied=sum(r["tie"] for _, r in held), of=len(held), quality=statistics.fmean(score(t, r) for t, r in held),
        parameters=size, adapter_bytes=None if size is None else 4 * size, step=cost.get("step"),
        kept=cost.get("kept"), evidence=[_line(t, r) for t, r in held],
    )  # fmt: skip


def _line(table: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    metric = next(iter(row["test"]))
    best = max(table["rows"], key=lambda r: score(table, r))
    knobs = "".join(f",{k}={v}" for k, v in table["knobs"].items())
    beside = "the best" if best is row else f"best {best['method']} {_figure(best['test'][metric])}"
    tied = ", not told apart" if row["tie"] and best is not row else ""
    rate = "" if row["learning_rate"] is None else f"; learning rate {row['learning_rate']:g}"
    end = " (end of its grid)" if row["at_end_of_grid"] else ""
    own = _figure(row["test"][metric])
    return f"{table['task']}{knobs} on {table['base']}: {metric} {own}, {beside}{tied}{rate}{end}"


def _figure(value: Mapping[str, float | None]) -> str:
    return f"{value['mean']:.3f}" + ("" if value["sd"] is None else f" ± {value['sd']:.3f}")


def _excluded(r: Recommendation, parameters: int | None, mergeable: bool, slower: float | None) -> str | None:
    if parameters is not None and r.parameters is not None and r.parameters > parameters:
        return f"it trains {r.parameters:,} parameters"
    if parameters is not None and r.parameters is None:
        return "how many parameters it trains depends on the data"
    if mergeable and r.method in METHODS and not METHODS[r.method].mergeable():
        return "it cannot be merged"
    if slower is not None and r.step is None:
        return "the time of its step is not measured"
    if slower is not None and r.step is not None and r.step > slower:
        return f"its step takes {r.step:g} times LoRA's"
    return None


def _too_large(base: Base, examples: Any, name: str, memory: int) -> str | None:
    try:
        cost = predict_cost(
            base, examples, method=limits.CONTROLS.get(name, name), objective=base.objective, measure=False
        )
        return limits.excess(cost, memory)
    except GraftError as error:
        return str(error)


def _unknown(telling: Sequence[Mapping], tables: Sequence[Mapping], base: Any, rows: int | None) -> list[str]:
    """What lies outside of what was measured."""
    said = []
    if len(telling) == 1:
        only = telling[0]
        said.append(f"one table alone speaks for this objective: {only['task']} on {only['base']}")
    if same := [t["task"] for t in tables if t not in telling]:
        said.append(f"not counted, since no method is better there than others or than the floor: {', '.join(same)}")
    sizes = [n for t in telling if (n := _size(t["base"]))]
    if base is not None and sizes:
        own = sum(p.numel() for p in base.model.parameters())
        if own > FAR * max(sizes):
            said.append(f"the largest base measured has {max(sizes):,} parameters, yours {own:,}: the order may differ")
    seen = [t["train_rows"] for t in telling if t["train_rows"]]
    if rows and seen and not min(seen) / FAR <= rows <= FAR * max(seen):
        said.append(f"measured were {min(seen):,} to {max(seen):,} rows to train on, yours are {rows:,}")
    most = max(t["steps"] for t in telling)
    said.append(f"the runs were short, {most} steps at most: longer ones may order methods differently")
    return said


def _size(base: str) -> int | None:
    found = bases.named(base) if base.startswith(SHIPPED) else None
    return None if found is None else found.card["parameters"]
