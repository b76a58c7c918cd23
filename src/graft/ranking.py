"""Which base model to adapt: each one trained on few rows, and its loss on all of them foretold.

graft.rank(["graft:seedling", "graft:seedling-small"], "task:rewrites", rows=512)
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from . import tasks
from .comparison import task_of
from .core.errors import GraftError
from .core.hyper import Range
from .models import architecture, load_base
from .runs import pool
from .runs.configuration import Configuration
from .runs.reference import chosen, tuning
from .runs.single import DTYPE, subset
from .scaling import ACCEPT, DELTA, Line, accept_then_stop
from .training.data import read
from .training.evaluation import choose


@dataclass(frozen=True)
class Ranked:
    """One base.

    base           as it was named
    foretold       its loss with all rows of train, in nats a row of the data: comparable between tokenizers
    measured       {rows of train: loss on the validation split}
    line           through the largest sizes, see `graft.scaling.accept_then_stop`
    learning_rate  that was best with the most rows
    failure        why it is not ranked, or None
    """

    base: str
    foretold: float | None
    measured: dict[int, float]
    line: Line | None
    learning_rate: float | None
    failure: str | None = None


def rank(
    models: Sequence[str],
    data: Any,
    *,
    method: Annotated[str, "what to train, with options if any: lora(rank=16), or full-fine-tuning"] = "lora",
    rows: Annotated[int | None, "of train that are trained on at most; by default a quarter of them", Range(1)] = None,
    least: Annotated[int, "rows: smaller sizes are not tried", Range(1)] = 32,
    epochs: Annotated[float, "passes over the rows of a run", Range(above=0)] = 3.0,
    learning_rates: Annotated[Sequence[float] | None, "to try with the most rows; by default the method's"] = None,
    batch_size: Annotated[int | None, "examples of a step; by default that of the task", Range(1)] = None,
    max_length: Annotated[int | None, "tokens of an example; by default that of the task", Range(1)] = None,
    delta: Annotated[float, "standard deviations off the line that end a base's runs", Range(above=0)] = DELTA,
    seed: Annotated[int, "of what is new in the models and of the order of the data"] = 0,
    validation: Annotated[Any, "own data: other data to measure on, or the share to hold out"] = 0.1,
    columns: Annotated[Mapping | None, "own data: {name that is needed: name in the data}"] = None,
    output: Annotated[str | Path, "folder of the records; runs that it has are not made again"] = "runs/rank",
    jobs: Annotated[int, "runs at a time, each in a process of its own", Range(1)] = 1,
    threads: Annotated[int, "of each run", Range(1)] = 1,
    progress: bool = True,
) -> list[Ranked]:
    """Rank base models by their foretold loss after training on all of the data, the best one first.

    Every base is trained on `rows`, rows / 2, rows / 4, ... rows, from the largest number downwards, the smaller ones
    within the larger, until its losses leave the line through those before (Accept then Stop). The line, extended to
    all rows of train, ranks the bases. Learning rates are tried with the most rows, and judged on the validation split.

    Selecting Large Language Model to Fine-tune via Rectified Scaling Law. Lin et al., 2024.
    https://arxiv.org/abs/2402.02314

    Raises `GraftError` for no or unknown models, for too few sizes between `least` and `rows`, and if no base could be
    trained.
    """
    if not models or isinstance(models, str):
        raise GraftError(f"models={models!r}: name at least one base in a list")
    folder = Path(output).expanduser()
    made = task_of(data, folder, {"validation": validation, "test": 0.1, "columns": columns})
    whole = len(made.rows("train"))
    sizes = _sizes(rows or whole // 4, least, whole)
    plans = []
    for base in dict.fromkeys(models):
        plans += tuning(
            made, method=[method], base=base, seed=seed, learning_rates=learning_rates, batch_size=batch_size,
            max_length=max_length,
        )  # fmt: skip
    plans = [[_with(c, sizes[0], epochs) for c in plan] for plan in plans]
    with pool.forks(threads) as forks:
        options: dict[str, Any] = {"jobs": jobs, "threads": threads, "progress": progress, "within": forks}
        tried = pool.run([c for plan in plans for c in plan], folder / "runs", **options)
        best = {c.base: c for c in chosen(plans, tried)}
        failures = {r.configuration.base: str(r.reason) for r in tried if r.configuration.base not in best}
        if not best:
            raise GraftError(f"no base can be trained: {next(iter(failures.values()))}")
        found: dict[str, dict[int, float]] = {base: {} for base in best}
        unit, going = {base: terms(c, made) for base, c in best.items()}, list(best.values())
        for now in [sizes[:ACCEPT], *([size] for size in sizes[ACCEPT:])]:
            for record in pool.run([_with(c, n, epochs) for c in going for n in now], folder / "runs", **options):
                base = record.configuration.base
                if record.done:
                    loss = record.metrics["validation"]["loss"]
                    found[base][record.configuration.train_rows or 0] = loss * unit[base]
                else:
                    failures[base] = str(record.reason)
            left = [c for c in going if c.base not in failures]
            going = [c for c in left if _line(found[c.base], delta).accepted == len(found[c.base])]
    ranked = []
    for base in dict.fromkeys(models):
        failure = failures.get(base)
        line = None if failure else _line(found[base], delta)
        rate = best[base].training.get("learning_rate") if base in best else None
        ranked.append(Ranked(base, line and line(whole), found.get(base, {}), line, rate, failure))
    return sorted(ranked, key=lambda r: math.inf if r.foretold is None else r.foretold)


def _sizes(most: int, least: int, whole: int) -> list[int]:
    """From `most` downwards, each half of the one before."""
    if most > whole:
        raise GraftError(f"rows={most}: the train split has {whole} rows")
    found = [most >> i for i in range(most.bit_length()) if most >> i >= least]
    if len(found) < ACCEPT:
        raise GraftError(
            f"rows={most} and least={least} leave {len(found)} sizes, and a line needs {ACCEPT}: "
            f"{least << (ACCEPT - 1)} rows would do"
        )
    return found


def _with(c: Configuration, rows: int, epochs: float) -> Configuration:
    """The same with fewer rows, and as many passes over them."""
    steps = math.ceil(epochs * rows / c.training["batch_size"])
    return replace(c, train_rows=rows, training={**c.training, "steps": steps})


def _line(losses: Mapping[int, float], delta: float) -> Line:
    return accept_then_stop([*losses], [*losses.values()], delta=delta)


def terms(c: Configuration, task: tasks.Task) -> float:
    """How many terms of the loss a row of the validation split has: 1 for a label, the tokens of an answer for text."""
    examples = read(subset(task, "validation", c.rows), columns=c.training.get("columns"))
    kind = choose("auto", examples, architecture(c.base))
    base = load_base(c.base, objective=kind.name, examples=read(task.rows("train")), dtype=DTYPE)
    own = kind(base.model, base.processor, max_length=c.training["max_length"])
    features = own.features(examples)
    return sum(own.terms(own.collate([f])) for f in features) / len(examples)
