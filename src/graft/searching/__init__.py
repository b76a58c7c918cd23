"""Which configuration, on this model and this data, within a budget and limits.

graft.search("graft:seedling", "task:rewrites", space=["lora(rank=2|4|8|16)", "ia3"], budget="20m")

space      what is searched, and how a point of it becomes a run
searchers  which point comes next, one file each; beliefs: what other tasks say of that
oneshot    supernets, which find methods and sizes in one run; supernets: that as the first half of a search
fits       what is known of a run before it starts
outcome    what a run was worth: objectives and limits
study      one search while it runs
engines    where the runs are made, one file each
report     results.json and report.html
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from .. import evidence
from ..catalogue import plain
from ..comparison import budget as budgets
from ..comparison import task_of
from ..comparison.live import Live
from ..core.errors import GraftError
from ..core.hyper import Range
from ..models import load_base
from ..runs import plan, pool
from ..runs.contestants import title
from ..runs.reference import QUANTISE, final, tuning
from ..runs.single import DTYPE
from ..runs.store import Record
from ..runs.summary import measured, spread
from . import engines, oneshot, report, searchers, supernets
from .fits import Fits
from .outcome import FIGURES, OBJECTIVES, checked, limits
from .space import Space
from .study import Study, Trial

PLAN = "search.json"
POINTS = 8  # of the validation loss of a run that a scheduler looks at
SPACE = ("lora(rank=2|4|8|16|32) on all-linear|attention|mlp", "dora(rank=2|4|8|16|32)", "pfeiffer(size=8|16|32|64)",
         "ia3", "bitfit")  # fmt: skip


@dataclass
class Search:
    """What `search` found.

    settings   what was asked for
    objective  the names of what was made small or large
    rows       one a trial, in the order in which they ended; `best` ones are those of `best`
    best       the best point, or the points of the Pareto front, run again: one row each
    verdict    why the search ended before its budget, if it did
    runs       the records of all runs
    supernet   what a one-shot search found, and the paths that it looked at; None without one
    folder     where everything lies: the records, results.json, report.html
    """

    settings: dict[str, Any]
    objective: tuple[str, ...]
    rows: list[dict[str, Any]]
    best: list[dict[str, Any]]
    verdict: str | None
    runs: list[Record]
    supernet: dict[str, Any] | None
    folder: Path


def search(
    model: str | Path,
    data: Any,
    *,
    space: Annotated[
        Sequence[str],
        "methods with what to try of each: lora(rank=4|8|16), lora(rank=4:64) on attention|mlp, "
        "lora(rank=0|4|8 per block)",
    ] = SPACE,
    learning_rate: Annotated[float | str, "what to try: 1e-4:1e-2, or 1e-3|3e-3"] = "3e-4:3e-2",
    schedule: Annotated[str, "what to try: linear, or linear|cosine|wsd"] = "linear",
    searcher: Annotated[
        str | None,
        "which point comes next; by default config, for several objectives autopeft. noah, nfts, glora, darts, "
        "tanglenas: a supernet finds methods and sizes within the limit of parameters, then learning rates are tried",
    ] = None,
    objective: Annotated[Sequence[str], f"what to improve: of {', '.join(OBJECTIVES)}; several give a Pareto front"] = (
        "quality",
    ),
    at_most: Annotated[Mapping | None, f"limits, of {', '.join(FIGURES)}: parameters=100000,memory=1GiB"] = None,
    budget: Annotated[str | None, "time for all of it, such as 20m"] = None,
    trials: Annotated[int | None, "runs of the search; without a budget 32", Range(1)] = None,
    steps: Annotated[int | None, "optimizer steps of a run; by default those of the task", Range(1)] = None,
    seeds: Annotated[Sequence[int], "of the runs of the best; the first one is that of the search"] = (0, 1, 2),
    batch_size: Annotated[int | None, "examples of a step; by default that of the task", Range(1)] = None,
    max_length: Annotated[int | None, "tokens of an example; by default that of the task", Range(1)] = None,
    rows: Annotated[
        int | None, "of each split that is measured, at most; by default that of the task", Range(1)
    ] = None,
    validation: Annotated[Any, "own data: other data to choose by, or the share to hold out"] = 0.1,
    test: Annotated[Any, "own data: other data to measure on, or the share to hold out"] = 0.1,
    columns: Annotated[Mapping | None, "own data: {name that is needed: name in the data}"] = None,
    quantise: Annotated[str | None, QUANTISE] = None,
    engine: Annotated[str, "where the runs are made: local, or ray"] = "local",
    scheduler: Annotated[
        str | None, "with ray: asha or hyperband, which stop bad runs early; pbt: they go on from better ones"
    ] = None,
    address: Annotated[str | None, "with ray: of a cluster, such as auto; by default this machine alone"] = None,
    output: Annotated[str | Path, "folder of the records, the results and the report"] = "runs/search",
    resume: Annotated[bool, "go on with the search in that folder: no run is made twice"] = False,
    jobs: Annotated[int, "runs at a time, each in a process of its own", Range(1)] = 1,
    threads: Annotated[int, "of each run", Range(1)] = 1,
    progress: bool = True,
) -> Search:
    """Try configurations of a space on a model and data, one run each, and run the best again with several seeds.

    model  a folder, the id of a model on the hub, or graft:NAME
    data   `task:NAME`, or data of your own: a file, a folder, "owner/name" on the hub, a list of dicts. Of own data a
           part is held out for validation and for test

    Every run has the same number of steps and the first seed, and is judged on the validation split: by the first
    metric of the task, or by the loss where it has none. What is known to be beyond a limit is not started. The best
    one within the limits, or with several objectives each one of the Pareto front, is then run with every seed and
    measured on the test split, which nothing else sees.

    A run that fails is a record with the reason, and the search goes on. What stopped goes on with `resume`, also with
    a larger budget.

    Raises `GraftError` for an unknown method, searcher or base, an empty space, a budget too small for the runs (it
    says what one costs), limits that nothing keeps to, and a folder that holds another search.
    """
    began, folder, names = time.monotonic(), Path(output).expanduser(), checked(objective)
    within, time_for_all = limits(at_most), None if budget is None else budgets.seconds(budget)
    made = task_of(data, folder, {"validation": validation, "test": test, "columns": columns})
    domains = {"learning_rate": learning_rate, "schedule": schedule}
    supernet = searcher if searcher in oneshot.names() else None
    if supernet and tuple(space) != SPACE:
        raise GraftError(f"{supernet} has a space of its own: leave space out, or choose another searcher")
    searched = None if supernet else Space.of(space, domains, load_base(model, dtype=DTYPE).model)
    kind = searchers.find((supernet is None and searcher) or ("config" if len(names) == 1 else "autopeft"))
    common = tuning(
        made, method=["lora"], base=str(model), quantise=quantise, seed=seeds[0], learning_rates=[1e-3], steps=steps,
        batch_size=batch_size, max_length=max_length, rows=rows,
    )[0][0]  # fmt: skip
    where, given = engines.find(engine), {k: v for k, v in (("scheduler", scheduler), ("address", address)) if v}
    if given and engine == "local":
        raise GraftError(f"{next(iter(given))} is for the engine ray: add engine=ray")
    if scheduler:
        common = replace(common, also={"points": POINTS})
    settings = plain({
        "model": str(model), "task": made.name, "knobs": common.knobs, "data": common.data, "quantise": quantise,
        "space": list(space), "domains": domains, "searcher": supernet or kind.name, "objective": names,
        "at_most": within, "seeds": list(seeds), "rows": common.rows, "also": common.also,
        "training": {k: v for k, v in common.training.items() if k not in domains},
    })  # fmt: skip
    known = plan.known(folder / PLAN, settings, resume=resume)
    if known is None:
        known = {"settings": settings, "supernet": None}
        if supernet:
            known["supernet"] = supernets.train(
                supernet, common, learning_rate, cap=within.get("parameters"), seed=seeds[0], progress=progress
            )
        plan.write(folder / PLAN, known)
    searched = searched or supernets.space(known["supernet"], domains)
    tables = evidence.tables() if {"quality", "loss"} & {*names} else []  # what they speak of
    asked = kind(searched, seed=seeds[0], objectives=len(names), limits=tuple(within), tables=tables)
    if trials is None and budget is None:
        trials = 32
    left = None if time_for_all is None else time_for_all - (time.monotonic() - began)
    study = Study(
        searched, asked, common, Fits(common, within), names,
        at_most=trials, seconds=left, reserved=len(seeds), jobs=jobs,
    )  # fmt: skip
    store, live = folder / "runs", Live(enabled=progress)
    with live, pool.forks(threads) as forks:
        options: dict[str, Any] = {"jobs": jobs, "threads": threads, "within": forks}
        if time_for_all is not None:
            study.expected = _cost(study, store, time_for_all, live, options)
        live.expect("search", [])
        where(study, store, tell=live.tell if progress else False, **options, **given)
        chosen = study.best()
        last = [c for t in chosen if t.configuration for c in final(t.configuration, seeds)]
        live.expect("seeds", last)
        finals = pool.run(last, store, progress=live.tell if progress else False, **options)
    found = Search(
        settings=settings | {"budget": budget, "trials": trials, "seconds": time.monotonic() - began},
        objective=names, rows=[_row(t, searched, chosen) for t in study.trials],
        best=[_best(t, finals) for t in chosen], verdict=asked.verdict,
        runs=[t.record for t in study.trials if t.record] + finals, supernet=known["supernet"], folder=folder,
    )  # fmt: skip
    report.write(found)
    if not chosen:
        raise GraftError(_none(study, within))
    return found


def _cost(study: Study, store: Path, available: float, live: Live, options: dict[str, Any]) -> float:
    """Seconds of a run, from a short one of some point; refused where the time is too small for one and the last."""
    short = study.short(budgets.TRIAL)
    live.expect("short run", [short])
    (record,) = pool.run([short], store, progress=live.tell if live.enabled else False, **options)
    if not record.done:
        return 0.0  # the search itself will tell what it costs
    steps, cost = study.common.training["steps"], budgets.Cost.of(record, 1)
    one = cost.fixed + steps * cost.step
    rounds = 1 + -(-study.reserved // study.jobs)
    if study.elapsed() + rounds * one > budgets.SHARE * available:
        needs = budgets.words((study.elapsed() + rounds * one) / budgets.SHARE)
        raise GraftError(
            f"the budget of {available:g} s is too small: one run of {steps} steps takes {one:.1f} s, and there are at "
            f"least one and those of {study.reserved} seeds at the end: {needs} would do; or take fewer steps or seeds"
        )
    return one


def _none(study: Study, within: Mapping[str, float]) -> str:
    """Why nothing was found."""
    for name, limit in within.items():
        kept = [t.outcome.over[name] for t in study.trials if name in t.outcome.over]
        if kept and min(kept) > 0:
            least = limit * math.exp(min(kept))
            return f"no configuration of the space keeps to {name}={limit:g}: the least seen is {least:.6g}"
    reasons = [t.outcome.reason for t in study.trials if t.outcome.reason]
    if not study.trials:
        return "the budget left no time for a run of the search"
    return f"no run of the search ended well within the limits: {reasons[0] if reasons else 'none keeps to all'}"


def _row(trial: Trial, space: Space, chosen: Sequence[Trial]) -> dict[str, Any]:
    """A trial as plain data."""
    c, record = trial.configuration, trial.record
    return {
        "title": title(c.method, c.options) if c else None,
        "point": plain(space.varied(trial.point)),
        "id": c and c.id,
        "status": "refused" if record is None else "done" if trial.outcome.losses else "failed",
        "reason": trial.outcome.reason,
        "best": trial in chosen,
        **{name: OBJECTIVES[name](record) if record and record.done else None for name in OBJECTIVES},
    }


def _best(trial: Trial, finals: Sequence[Record]) -> dict[str, Any]:
    """A chosen configuration as plain data, with what its runs got on the test split."""
    assert trial.configuration and trial.record
    c = trial.configuration
    own = [r for r in finals if r.done and replace(r.configuration, seed=c.seed, splits=c.splits) == c]
    return {
        "title": title(c.method, c.options),
        "method": c.method,
        "options": plain(c.options),
        "targets": plain(c.targets),
        "training": plain(c.training),
        "validation": trial.record.metrics["validation"],
        "seeds": [r.configuration.seed for r in own],
        "test": {m: spread([r.metrics["test"][m] for r in own]) for m in measured(c)} if own else {},
        **{name: FIGURES[name](trial.record) for name in FIGURES},
    }
