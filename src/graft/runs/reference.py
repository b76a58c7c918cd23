"""The reference runs of a task: every contestant at its best learning rate, over several seeds."""

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any

from .. import tasks
from ..core.errors import GraftError
from ..core.fingerprint import fingerprint
from ..core.hyper import Range
from ..models import load_base
from .configuration import Configuration
from .contestants import Contestant, default
from .pool import run
from .single import DTYPE
from .store import Record, archive
from .summary import Summary, choose, summarise

TRAINING = {"schedule": "linear", "warmup": 0.06, "optimizer": "adamw", "weight_decay": 0.0, "clip": 1.0}
QUANTISE = "the base's linear layers: int8, or int8-weights and nf4 with the extra `quantised`"


def reference(
    task: str | tasks.Task,
    *,
    method: Annotated[
        Sequence[str] | None,
        "what to compare: methods, with options if any: lora(rank=16); and zero-shot, linear-probe, full-fine-tuning. "
        "By default the reference set",
    ] = None,
    base: Annotated[str | None, "the base model; by default that of the task"] = None,
    quantise: Annotated[str | None, QUANTISE] = None,
    seeds: Annotated[Sequence[int], "of the runs at the chosen rate; the first one tries the rates"] = (0, 1, 2),
    learning_rates: Annotated[Sequence[float] | None, "to try; by default those of the method"] = None,
    steps: Annotated[int | None, "optimizer steps; by default those of the task", Range(1)] = None,
    batch_size: Annotated[int | None, "examples of a step; by default that of the task", Range(1)] = None,
    max_length: Annotated[int | None, "tokens of an example; by default that of the task", Range(1)] = None,
    rows: Annotated[int | None, "of validation and of test, at most; by default that of the task", Range(1)] = None,
    output: Annotated[
        str | Path, "folder of the records, one file a run; runs that it has are not made again"
    ] = "runs/tasks",
    archived: Annotated[
        str | Path | None, "file to put the records into as well, one a line, with short curves"
    ] = None,
    jobs: Annotated[int, "runs at a time, each in a process of its own", Range(1)] = 1,
    threads: Annotated[int, "of each run", Range(1)] = 1,
    retry: Annotated[bool, "make runs again that failed"] = False,
    progress: bool = True,
) -> list[Summary]:
    """Tune the learning rate of every contestant on the validation split of a task, then measure it on the test split.

    task  a task, or its name with knobs: "rewrites,rules=64"

    Every rate is tried with the first seed. The best one is that with the best first metric of the task on the
    validation split; where the metric does not decide, or there is none, that with the lowest loss. With this rate a
    run is made for each seed, and only these see the test split. The seed is that of what is new in the model and of
    the order of the data; the task's own is one of its knobs. All contestants train with AdamW, a linear schedule and
    one rate for all parameters, and the parameters after the last step count.
    """
    made = tasks.parse(task)[0] if isinstance(task, str) else task
    plans = tuning(
        made, method=method, base=base, quantise=quantise, seed=seeds[0], learning_rates=learning_rates, steps=steps,
        batch_size=batch_size, max_length=max_length, rows=rows,
    )  # fmt: skip
    options: dict[str, Any] = {"jobs": jobs, "threads": threads, "retry": retry, "progress": progress}
    tried = run([c for plan in plans for c in plan], output, **options)
    found = [*tried, *run([c for best in chosen(plans, tried) for c in final(best, seeds)], output, **options)]
    if archived:
        archive(archived, found)
    return summarise(found)


def tuning(
    task: tasks.Task,
    *,
    method: Sequence[str] | None = None,
    base: str | None = None,
    quantise: str | None = None,
    seed: int = 0,
    learning_rates: Sequence[float] | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    max_length: int | None = None,
    rows: int | None = None,
) -> list[list[Configuration]]:
    """For each contestant one configuration a learning rate; arguments as in `reference`."""
    usual = task.reference
    training: dict[str, Any] = {
        "steps": steps or usual.steps,
        "batch_size": batch_size or usual.batch_size,
        "max_length": max_length or usual.max_length,
        "precision": usual.precision,
        **({"columns": dict(usual.columns)} if usual.columns else {}),
        **TRAINING,
    }
    place = base or usual.base
    if not place:
        raise GraftError(f"the task {task.name} has no base of its own: name one, such as base='graft:seedling'")
    weights = fingerprint(load_base(place, dtype=DTYPE, quantise=quantise).model)
    common = Configuration(
        base=place, weights=weights, quantise=quantise, task=task.name, version=task.version,
        knobs={knob.name: getattr(task, knob.name) for knob in fields(task)}, data=task.fingerprint(), method="",
        rows=rows or usual.rows, seed=seed,
    )  # fmt: skip
    plans = []
    for name in method or default(task.labels is not None):
        contestant = Contestant.of(name)
        own = replace(common, method=contestant.method, options=contestant.options, training=training)
        tried = sorted(learning_rates or contestant.rates) if contestant.trains else []
        plans.append([replace(own, training=training | {"learning_rate": rate}) for rate in tried] or [own])
    return plans


def chosen(plans: Sequence[Sequence[Configuration]], tried: Sequence[Record]) -> list[Configuration]:
    """Of each plan the configuration at the best rate; none of a plan whose runs all failed."""
    by_id = {r.configuration.id: r for r in tried}
    best = [choose([by_id[c.id] for c in plan if c.id in by_id]) for plan in plans]
    return [record.configuration for record in best if record]


def final(best: Configuration, seeds: Sequence[int], **changes: Any) -> list[Configuration]:
    """The chosen run for each seed, measured on the test split as well; the base as it is knows no seed."""
    needed = seeds[:1] if best.method == "zero-shot" else seeds
    return [replace(best, seed=seed, splits=("validation", "test"), **changes) for seed in needed]
