"""One run, in this process."""

import importlib.metadata
import os
import platform
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .. import tasks
from ..core.adapter import Adapter
from ..core.errors import GraftError
from ..core.files import TENSORS
from ..core.recipe import Recipe
from ..models import Base, load_base
from ..training import Result, evaluate, fit
from ..training.data import read
from ..training.evaluation import choose
from ..training.messages import said
from ..training.objectives import Objective
from ..tuning import tune
from ..version import __version__
from .configuration import Configuration
from .store import Record

DTYPE = "float32"  # of the base, for all alike: what is trained in place needs it


def perform(configuration: Configuration) -> Record:
    """Train what the configuration says and measure it. A run that cannot be made gives a record with the reason."""
    begun = time.perf_counter()
    try:
        found = _performed(configuration)
    except Exception as error:
        traceback.print_exc()
        return failed(configuration, _reason(error), time.perf_counter() - begun)
    found["seconds"]["in_all"] = time.perf_counter() - begun
    return Record(configuration=configuration, status="done", environment=environment(), **found)


def failed(configuration: Configuration, reason: str, seconds: float) -> Record:
    """The record of a run that failed after so many seconds."""
    took = {"in_all": seconds}
    return Record(configuration=configuration, status="failed", reason=reason, seconds=took, environment=environment())


def subset(task: tasks.Task, split: str, rows: int) -> tasks.Rows:
    """At most so many rows of a split, drawn by the task's seed, in their order."""
    found = task.rows(split)
    if len(found) <= rows:
        return found
    return found.select(sorted(task.draw(f"{rows} rows of {split}").sample(range(len(found)), rows)))


def environment() -> dict[str, Any]:
    """Versions, processor and threads."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    return {
        "graft": __version__,
        "python": platform.python_version(),
        **versions,
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _performed(configuration: Configuration) -> dict[str, Any]:
    task = tasks.task(configuration.task, **configuration.knobs)
    training = dict(configuration.training)
    train = CONTROLS.get(configuration.method, _adapted)
    base, result, adapter = train(configuration, task, training)
    begun = time.perf_counter()
    trained = [] if result is None else list(adapter.parameters() if adapter else base.model.parameters())
    metrics, baseline = {}, {}
    for split in configuration.splits:
        rows = subset(task, split, configuration.rows)
        metrics[split] = evaluate(base.model, rows, columns=training.get("columns"), **base.arguments())
        baseline[split] = task.baseline(rows)
    seconds = {"measuring": time.perf_counter() - begun}
    if result is not None:
        seconds |= {"training": sum(r["seconds"] for r in result.history), "step": result.step_seconds}
    return {
        "metrics": metrics,
        "baseline": baseline,
        "curve": [] if result is None else [[r["step"], float(f"{r['loss']:.6g}")] for r in result.history],
        "parameters": sum(p.numel() for p in trained),
        "adapter_bytes": _saved(adapter) if adapter else sum(p.numel() * p.element_size() for p in trained),
        "seconds": seconds,
        "peak_memory": None if result is None else result.peak_memory,
    }


# What is trained: the base, what `fit` said, and the adapter, each of them if there is one.

Trained = tuple[Base, Result | None, Adapter | None]


def _adapted(configuration: Configuration, task: tasks.Task, training: dict[str, Any]) -> Trained:
    recipe = Recipe.of(configuration.method, **configuration.options)
    done = tune(
        configuration.base, task.rows("train"), method=recipe, targets=configuration.targets, dtype=DTYPE,
        seed=configuration.seed, progress=False, **training,
    )  # fmt: skip
    return done.base, done.result, done.adapter


def _zero_shot(configuration: Configuration, task: tasks.Task, training: dict[str, Any]) -> Trained:
    """The base as it is."""
    base = _loaded(configuration, task, training)
    if base.heads:
        raise GraftError(f"the base has no {', '.join(base.heads)} of its own, so it answers nothing without training")
    return base, None, None


def _linear_probe(configuration: Configuration, task: tasks.Task, training: dict[str, Any]) -> Trained:
    """The head of a classifier, on the base as it is."""
    if (objective := _objective(task, training)).generates:
        raise GraftError(f"the base has all the outputs that {objective.name} needs, so there is no new head to train")
    return _adapted(replace(configuration, method="full"), task, training)


def _full_fine_tuning(configuration: Configuration, task: tasks.Task, training: dict[str, Any]) -> Trained:
    """All parameters of the base itself: a copy beside it, as `full` makes, would part what is tied."""
    base = _loaded(configuration, task, training)
    base.model.requires_grad_(True)
    base.max_length = training.get("max_length")
    result = fit(
        base.model, task.rows("train"), processor=base.processor, objective=base.objective or "auto",
        seed=configuration.seed, progress=False, **training,
    )  # fmt: skip
    return base, result, None


CONTROLS: dict[str, Callable[[Configuration, tasks.Task, dict[str, Any]], Trained]] = {
    "zero-shot": _zero_shot,
    "linear-probe": _linear_probe,
    "full-fine-tuning": _full_fine_tuning,
}


def _objective(task: tasks.Task, training: dict[str, Any]) -> type[Objective]:
    return choose("auto", read(task.rows("train"), columns=training.get("columns")))


def _loaded(configuration: Configuration, task: tasks.Task, training: dict[str, Any]) -> Base:
    examples, objective = read(task.rows("train"), columns=training.get("columns")), _objective(task, training).name
    base = load_base(configuration.base, objective=objective, examples=examples, dtype=DTYPE, seed=configuration.seed)
    base.max_length = training.get("max_length")
    return base


def _saved(adapter: Adapter) -> int:
    with tempfile.TemporaryDirectory() as place:
        adapter.save(Path(place) / "adapter")
        return (Path(place) / "adapter" / TENSORS).stat().st_size


def _processor() -> str:
    """What the processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _reason(error: Exception) -> str:
    if isinstance(error, GraftError):
        return str(error)
    exhausted = isinstance(error, MemoryError) or "out of memory" in str(error) or "allocate memory" in str(error)
    return "memory ran out" if exhausted else f"{type(error).__name__}: {said(error)}"
