"""Which method, at which cost, on this model and this data: many runs under one protocol, and what they show.

graft.compare("graft:seedling", "task:rewrites", methods=["lora", "dora"], budget="20m")

budget     how many steps fit into a time
fitting    short runs that say so, and who gets the steps where the time is too short for all
guard      scores of a validation set that is looked at again and again
outcome    rows of a table from the records of runs
live       the table while it runs
report     results.json, results.parquet and report.html
"""

import hashlib
import importlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from .. import tasks
from ..catalogue import plain
from ..core import disk
from ..core.delta import METHODS
from ..core.errors import GraftError
from ..core.hyper import Range
from ..models import Base, load_base
from ..runs import contestants, limits, plan, pool
from ..runs.contestants import Contestant
from ..runs.reference import QUANTISE, chosen, final, tuning
from ..runs.single import DTYPE, UNTRAINED, some
from ..runs.store import Record, Store
from ..runs.summary import Summary, summarise
from ..training.data import read
from ..training.evaluation import choose
from ..training.messages import nearest
from ..tuning import trained
from . import budget as budgets
from . import outcome, report
from .fitting import Fitted, Fitting, look, name, training
from .live import Live

PLAN = "comparison.json"
POINTS = 8  # of the curve of the validation loss
FORGETTING_ROWS = 64


@dataclass
class Comparison:
    """What `compare` found.

    settings   what was asked for, and the number of steps
    rows       one a contestant, as `graft.comparison.outcome.rows` gives it, the best one first
    runs       the records of all runs
    target     the validation loss that the time to target is about
    predicts   how well the validation loss ranks the runs, see `outcome.predicts`
    sizes      of the runs with fewer rows: {rows of train: rows of a table}
    unfit      methods that are not part of it, and why
    screened   where the budget was too small for all: what `graft.comparison.fitting.Fitted` says of each method
    folder     where everything lies: the records, results.json, results.parquet, report.html
    """

    settings: dict[str, Any]
    rows: list[dict[str, Any]]
    runs: list[Record]
    target: float | None
    predicts: dict[str, Any] | None
    sizes: dict[int, list[dict[str, Any]]]
    unfit: dict[str, str]
    screened: list[dict[str, Any]]
    folder: Path


def compare(
    model: str | Path,
    data: Any,
    *,
    methods: Annotated[
        Sequence[str],
        "what to compare: methods, with options if any: lora(rank=16); all: every method of the catalogue that fits "
        "the model, beside it -NAME: but this one. The controls are always part of it",
    ] = ("lora", "dora", "ia3", "bitfit"),
    budget: Annotated[
        str | None,
        "time for all of it, such as 20m: as many steps as fit, for all alike; where too few fit, the methods are "
        "screened first, and the best ones are compared",
    ] = None,
    steps: Annotated[
        int | None, "optimizer steps of a run, with a budget at most; by default those of the task", Range(1)
    ] = None,
    seeds: Annotated[Sequence[int], "of the runs at the chosen rate; the first one tries the rates"] = (0, 1, 2),
    learning_rates: Annotated[Sequence[float] | None, "to try; by default those of the method"] = None,
    memory: Annotated[
        str | None, "what the tensors of a run may take, such as 2GiB: what would take more is not started"
    ] = None,
    batch_size: Annotated[int | None, "examples of a step; by default that of the task", Range(1)] = None,
    max_length: Annotated[int | None, "tokens of an example; by default that of the task", Range(1)] = None,
    rows: Annotated[
        int | None, "of each split that is measured, at most; by default that of the task", Range(1)
    ] = None,
    sizes: Annotated[Sequence[int], "numbers of train rows to measure a learning curve over, at the chosen rate"] = (),
    target: Annotated[
        float | None, "validation loss whose time is taken; by default what every seed of full fine-tuning ends with"
    ] = None,
    forgetting: Annotated[
        str | None,
        "data of the kind that the base was made of, whose loss is taken before and after; auto: task:code for a "
        "causal language model; none",
    ] = "auto",
    validation: Annotated[Any, "own data: other data to choose rates on, or the share to hold out"] = 0.1,
    test: Annotated[Any, "own data: other data to measure on, or the share to hold out"] = 0.1,
    columns: Annotated[Mapping | None, "own data: {name that is needed: name in the data}"] = None,
    quantise: Annotated[str | None, QUANTISE] = None,
    output: Annotated[str | Path, "folder of the records, the results and the report"] = "runs/compare",
    resume: Annotated[bool, "go on with the comparison in that folder: no run is made twice"] = False,
    jobs: Annotated[int, "runs at a time, each in a process of its own", Range(1)] = 1,
    threads: Annotated[int, "of each run", Range(1)] = 1,
    retry: Annotated[bool, "make runs again that failed"] = False,
    progress: bool = True,
) -> Comparison:
    """Train several methods and the controls on the same data, with the same number of steps, and compare them.

    model  a folder, the id of a model on the hub, or graft:NAME
    data   `task:NAME`, or data of your own: a file, a folder, "owner/name" on the hub, a list of dicts. Of own data a
           part is held out for validation and for test

    Each learning rate of each contestant is tried with the first seed and judged on the validation split; at the best
    one a run is made for each seed, and only these see the test split. The controls: full fine-tuning; a linear probe
    where there are classes; the base as it is and with answered examples in its context where it generates; and a
    no-op, the base whose new head is not trained. A method that is not shown to beat a control is marked so.

    With a budget that is too small for 8 steps of every run, the methods are screened for half of the time that the
    controls leave: 8 steps with the highest rate, then, the best ones first, with the other rates; judged by the loss
    on at most 128 rows of the validation split. The best ones are compared with the controls, as many as fit with 32
    steps or more. What is left out is not shown to be worse.

    A run that fails is a record with the reason, and the others go on. What stopped goes on with `resume`.

    Raises `GraftError` for an unknown method or base, no methods, data that no objective fits, a budget too small for
    the runs (it says which one would do), and a folder that holds another comparison.
    """
    begun, folder = time.monotonic(), Path(output).expanduser()
    time_for_all = None if budget is None else budgets.seconds(budget)
    allowed = None if memory is None else limits.size(memory)
    made = task_of(data, folder, {"validation": validation, "test": test, "columns": columns})
    rest = [size for size in sizes if not 0 < size <= len(made.rows("train"))]
    if rest:
        raise GraftError(f"sizes={rest[0]}: the train split of {made.name} has {len(made.rows('train'))} rows")
    base = load_base(model, dtype=DTYPE, quantise=quantise)
    examples = read(made.rows("train"), columns=made.reference.columns)
    objective = choose("auto", examples, type(base.model).__name__)
    names, unfit = _contestants(methods, base, made, objective)
    also = {"points": POINTS, "latency": True}
    if forgets := _forgetting(forgetting, objective.name):
        also["forgetting"] = forgets
    plans = tuning(
        made, method=names, base=str(model), quantise=quantise, seed=seeds[0], learning_rates=learning_rates,
        steps=steps, batch_size=batch_size, max_length=max_length, rows=rows,
    )  # fmt: skip
    plans = [[replace(c, splits=("train", "validation")) for c in of] for of in plans]
    settings = plain({
        "model": str(model), "task": made.name, "knobs": plans[0][0].knobs, "data": plans[0][0].data, "methods": names,
        "quantise": quantise, "budget": budget, "steps": steps, "memory": memory, "seeds": list(seeds),
        "learning_rates": learning_rates, "sizes": list(sizes), "target": target, "also": also,
        "rows": plans[0][0].rows, "training": plans[0][0].training,
    })  # fmt: skip
    known = plan.known(folder / PLAN, settings, resume=resume)
    store, live = folder / "runs", Live(enabled=progress)
    options: dict[str, Any] = {
        "jobs": jobs, "threads": threads, "retry": retry, "progress": live.tell if progress else False
    }  # fmt: skip
    with live, pool.forks(threads) as options["within"]:
        if known is None:
            if allowed is not None:
                reasons = {name(of[0]): limits.misfit(of[0], memory=allowed) for of in plans}
                unfit |= {name: reason for name, reason in reasons.items() if reason}
                plans = [of for of in plans if name(of[0]) not in unfit]
                if all(of[0].method in UNTRAINED for of in plans):
                    raise GraftError(f"no contestant keeps within memory={memory}: {next(iter(unfit.values()))}")
            fit = Fitted(plans[0][0].training["steps"], {}, [])
            if time_for_all is not None:
                fit = Fitting(
                    plans, also, len(seeds), len(sizes), time_for_all, steps, begun, store, options, live
                ).fitted()
            known = {"settings": settings, "steps": fit.steps, "unfit": unfit | fit.unfit, "screened": fit.screened}
            plan.write(folder / PLAN, known)
        unfit, screened = known["unfit"], known["screened"]
        looks = [r for of in plans for c in of if screened and (r := Store(store).get(look(c)))]
        out = {*unfit, *(row["method"] for row in screened if not row["compared"])}
        plans = [[training(c, steps=known["steps"]) for c in of] for of in plans if name(of[0]) not in out]
        live.expect("learning rates", [c for of in plans for c in of])
        tried = pool.run([c for of in plans for c in of], store, **options)
        last = [c for best in chosen(plans, tried) for c in final(best, seeds, also=also)]
        fewer = [replace(c, train_rows=n, also={}) for n in sizes for c in last if c.method not in UNTRAINED]
        live.expect("seeds", last)
        finals = pool.run(last, store, **options)
        live.expect("fewer rows", fewer)
        curve = pool.run(fewer, store, **options)
    found = summarise([*tried, *finals])
    target = outcome.end_of(found) if target is None else target
    table = sorted(outcome.rows(found, target), key=_order)
    result = Comparison(
        settings=settings | {"steps": known["steps"], "seconds": time.monotonic() - begun}, rows=table,
        runs=[*looks, *tried, *finals, *curve], target=target, predicts=outcome.predicts(found),
        sizes={n: _at(n, found, curve) for n in sizes}, unfit=unfit, screened=screened,
        folder=folder,
    )  # fmt: skip
    report.write(result)
    return result


def task_of(data: Any, folder: Path, knobs: Mapping[str, Any]) -> tasks.Task:
    """The task that is named, or one of the user's data; a list is written into the folder, for the other processes."""
    if isinstance(data, tasks.Task):
        return data
    if isinstance(data, str) and data.startswith("task:"):
        made, split = tasks.parse(data.removeprefix("task:"))
        if split:
            raise GraftError(f"{data}: a comparison uses train, validation and test: leave split={split} out")
        return made
    if not isinstance(data, str | Path):
        try:
            lines = "".join(f"{json.dumps(dict(row))}\n" for row in read(data))
        except TypeError as error:
            raise GraftError(f"the data cannot be written as JSON lines ({error}): pass a file or a folder") from None
        folder.mkdir(parents=True, exist_ok=True)
        data = folder / f"data-{hashlib.sha256(lines.encode()).hexdigest()[:16]}.jsonl"
        disk.replace(data, lines.encode())
    return tasks.task("own", data=str(data), **{k: str(v) if isinstance(v, Path) else v for k, v in knobs.items()})


def _contestants(
    methods: Sequence[str], base: Base, task: tasks.Task, objective: Any
) -> tuple[list[str], dict[str, str]]:
    """The names of all contestants, the controls first, and what does not fit the model with the reason."""
    if isinstance(methods, str):
        methods = [methods]
    if not methods:
        raise GraftError("methods is empty: name some, such as lora, or all")
    controls = ["no-op", "linear-probe"] if "accuracy" in objective.metrics else ["no-op", "zero-shot"]
    if objective.name == "causal-lm" and task.metrics:
        controls.append("in-context")
    controls.append("full-fine-tuning")
    unfit: dict[str, str] = {}
    out = [name[1:] for name in methods if name.startswith("-")]
    if out and "all" not in methods:
        raise GraftError(f"methods leaves {out[0]} out, but -{out[0]} has a meaning beside all only")
    if "all" in methods:
        importlib.import_module("graft.methods").load()
        if unknown := next((name for name in out if name not in METHODS), None):
            raise GraftError(f"no method is called {unknown!r}: {nearest(unknown, METHODS)}")
        reasons = {name: _refuses(base, name) for name in sorted(METHODS) if name not in out}
        unfit = {k: v for k, v in reasons.items() if v}
        also = [name for name in methods if name != "all" and not name.startswith("-")]
        methods = [*(k for k, v in reasons.items() if not v), *also]
    named = [Contestant.of(name) for name in methods]  # refuses what is unknown
    titles = [contestants.title(c.method, c.options) for c in named if c.method not in controls]
    if twice := next((t for t in titles if titles.count(t) > 1), None):
        raise GraftError(f"methods names {twice} twice")
    return [*controls, *(m for m, c in zip(methods, named) if c.method not in controls)], unfit


def _refuses(base: Base, name: str) -> str | None:
    """Why a method with its defaults cannot be put on a model, or None."""
    if METHODS[name].targets == "head":
        return "it is for new heads: linear-probe is that control"
    try:
        trained(base, name)
    except GraftError as error:
        return str(error)
    return None


def _forgetting(asked: str | None, objective: str) -> dict[str, Any] | None:
    if asked is None or asked == "none" or (asked == "auto" and objective != "causal-lm"):
        return None
    if objective != "causal-lm":
        raise GraftError(
            f"forgetting={asked}: the loss on other data is that of a causal language model, not of {objective}"
        )
    name = "task:code" if asked == "auto" else asked
    held = json.dumps(some(name, FORGETTING_ROWS), sort_keys=True, default=str)
    return {"data": name, "rows": FORGETTING_ROWS, "fingerprint": hashlib.sha256(held.encode()).hexdigest()}


def _order(row: Mapping[str, Any]) -> tuple:
    quality = row["quality"]
    return quality is None or math.isnan(quality), -(quality or 0.0), row["method"]


def _at(size: int, found: Sequence[Summary], curve: Sequence[Record]) -> list[dict[str, Any]]:
    """The rows of a table of the runs with so many train rows, and of the controls that see none."""
    made = []
    for s in found:
        own = [r for r in curve if r.configuration.train_rows == size and name(r.configuration) == s.title]
        part = replace(s, final=[r for r in own if r.done]) if own else s
        if own or s.setting.method in UNTRAINED:
            made.append(part)
    return outcome.rows(made)
