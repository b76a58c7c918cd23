"""One run, in this process."""

import contextlib
import importlib.metadata
import os
import platform
import random
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import tasks
from ..core.adapter import Adapter
from ..core.errors import GraftError
from ..core.files import TENSORS
from ..core.merge import merge
from ..core.recipe import Recipe
from ..models import Base, architecture, load_base
from ..training import Result, evaluate, fit
from ..training.data import Examples, columns_of, read
from ..training.evaluation import choose, evaluating
from ..training.messages import said
from ..training.objectives import on
from ..training.text import limit
from ..tuning import tune
from ..version import __version__
from .configuration import Configuration
from .store import Record

DTYPE = "float32"  # of the base, for all alike: what is trained in place needs it
SHOTS = 4  # answered examples in the context, at most
BATCH, PASSES = 8, 6  # examples of a batch whose forward pass is timed, and how often


def perform(
    configuration: Configuration, watch: Callable[[dict[str, Any]], Any] | None = None, folder: Path | None = None
) -> Record:
    """Train what the configuration says and measure it. A run that cannot be made gives a record with the reason.

    watch   called with each entry of the history of the training (see `graft.fit`)
    folder  of the training, in which its adapter is left at the end: a checkpoint after each point of the validation
            loss, or after each epoch; a training that is there goes on
    """
    begun = time.perf_counter()
    try:
        found = _performed(configuration, watch, folder)
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


def some(data: str, rows: int) -> list[dict[str, Any]]:
    """The first rows of data that is no task of the run: those of its test split, if it has one."""
    found = read(data, split="test")
    return [dict(found[i]) for i in range(min(rows, len(found)))]


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


def load(configuration: Configuration, device: str | None = None) -> Base:
    """The base of a run, loaded for its data, as for a control that is not trained."""
    task, columns = tasks.task(configuration.task, **configuration.knobs), configuration.training.get("columns")
    return _loaded(configuration, read(task.rows("train"), columns=columns), {}, device)


def recipes(configuration: Configuration) -> list[Recipe]:
    """The method of a run, or those of its chain."""
    names, options = configuration.method.split("+"), configuration.options
    return [Recipe.of(name, **(options if len(names) == 1 else options.get(name, {}))) for name in names]


def _performed(
    configuration: Configuration, watch: Callable[[dict[str, Any]], Any] | None, folder: Path | None
) -> dict[str, Any]:
    task = tasks.task(configuration.task, **configuration.knobs)
    if configuration.data and configuration.data != task.fingerprint():
        raise GraftError(f"the data of {task.name} are not those that the run was planned with: plan it anew")
    training = {**configuration.training, "watch": watch}
    columns = training.pop("columns", None)
    if points := configuration.also.get("points"):
        training["validation"] = read(subset(task, "validation", configuration.rows), columns=columns)
        training |= {"eval_every": -(-training["steps"] // points), "keep": "last"}
    if folder:
        training |= {"output": folder, "resume": folder.with_name(f"{folder.name}.run").exists()}
        training["save_every"] = training.get("eval_every")
    examples = read(train_rows(task, configuration.train_rows), columns=columns)
    base, result, adapters, ask = CONTROLS.get(configuration.method, _adapted)(configuration, examples, training)
    begun = time.perf_counter()
    own = [p for adapter in adapters for p in adapter.parameters()]
    trained = [] if result is None else own or list(base.model.parameters())
    metrics, baseline = {}, {}
    for split in configuration.splits:
        rows = subset(task, split, configuration.rows)
        metrics[split] = evaluate(base.model, ask(rows, columns), columns=columns, **base.arguments())
        baseline[split] = task.baseline(rows)
    seconds, history = {"measuring": time.perf_counter() - begun}, [] if result is None else result.history
    steps = [r for r in history if "loss" in r]
    if result is not None:
        seconds |= {"training": sum(r["seconds"] for r in steps), "step": result.step_seconds}
    figures = {}
    if points:
        figures["validation"] = _validation_curve(history)
    if configuration.also.get("latency"):
        rows = subset(task, "validation", BATCH)
        figures["latency"] = _latency(base, bool(adapters), read(ask(rows, columns), columns=columns))
    if other := configuration.also.get("forgetting"):
        text = some(other["data"], other["rows"])
        figures["forgetting"] = evaluate(base.model, text, objective="causal-lm", processor=base.processor)["loss"]
    return {
        "metrics": metrics,
        "baseline": baseline,
        "curve": [[r["step"], float(f"{r['loss']:.6g}")] for r in steps],
        "parameters": sum(p.numel() for p in trained),
        "adapter_bytes": sum(map(_saved, adapters)) or sum(p.numel() * p.element_size() for p in trained),
        "seconds": seconds,
        "peak_memory": None if result is None else result.peak_memory,
        "figures": figures,
    }


def train_rows(task: tasks.Task, count: int | None) -> tasks.Rows:
    """The rows to learn from: all, or so many drawn by the task's seed; fewer are some of more."""
    rows = task.rows("train")
    if count is None:
        return rows
    if count > len(rows):
        raise GraftError(f"train_rows={count}: the train split of {task.name} has {len(rows)} rows")
    order = list(range(len(rows)))
    task.draw("rows to train on").shuffle(order)
    return rows.select(sorted(order[:count]))


# What is trained: the base, what `fit` said if it was called, the adapters, and how rows are asked.


class Trained(NamedTuple):
    base: Base
    result: Result | None = None
    adapters: Sequence[Adapter] = ()
    ask: Callable[[tasks.Rows, Mapping[str, str] | None], tasks.Rows] = lambda rows, columns: rows


def _adapted(configuration: Configuration, examples: Examples, training: dict[str, Any]) -> Trained:
    done = tune(
        configuration.base, examples, method=recipes(configuration), targets=configuration.targets, dtype=DTYPE,
        quantise=configuration.quantise, seed=configuration.seed, progress=False, **training,
    )  # fmt: skip
    return Trained(done.base, done.result, list(done.adapters.values()))


def _zero_shot(configuration: Configuration, examples: Examples, training: dict[str, Any]) -> Trained:
    """The base as it is."""
    base = _loaded(configuration, examples, training)
    if base.heads:
        raise GraftError(f"the base has no {', '.join(base.heads)} of its own, so it answers nothing without training")
    return Trained(base)


def _in_context(configuration: Configuration, examples: Examples, training: dict[str, Any]) -> Trained:
    """The base as it is, asked after some answered examples of the train split, drawn by the seed."""
    base, present = _loaded(configuration, examples, {}), columns_of(examples)
    kind = next((k for k in ("messages", "prompt") if k in present), None)
    if base.objective != "causal-lm" or kind is None:
        raise GraftError("examples in the context need prompts with completions or messages, and a causal model")
    draw = random.Random(f"in-context {configuration.seed}")
    shots = [examples[i] for i in draw.sample(range(len(examples)), min(SHOTS, len(examples)))]
    longest = limit(base.model, base.processor, None)

    def tokens(asked: Any) -> int:
        text = asked if isinstance(asked, str) else "".join(m["content"] for m in asked)
        return len(base.processor(text, verbose=False)["input_ids"])

    def ask(rows: tasks.Rows, columns: Mapping[str, str] | None) -> tasks.Rows:
        name, room = (columns or {}).get(kind, kind), longest - rows.generation["max_new_tokens"]
        for count in range(len(shots), 0, -1):
            if kind == "messages":
                before: Any = [m for shot in shots[:count] for m in shot["messages"]]
            else:
                before = "".join(f"{shot['prompt']}{shot['completion']}\n\n" for shot in shots[:count])
            asked = [row | {name: before + row[name]} for row in rows]
            if max(tokens(row[name]) for row in asked) <= room:
                return tasks.Rows(asked, rows.task, rows.split)
        raise GraftError(f"not one answered example fits before the prompts within the {longest} tokens of the base")

    return Trained(base, ask=ask)


def _no_op(configuration: Configuration, examples: Examples, training: dict[str, Any]) -> Trained:
    """The base as it is, whose new head, if it needs one, is not trained."""
    return Trained(_loaded(configuration, examples, training))


def _linear_probe(configuration: Configuration, examples: Examples, training: dict[str, Any]) -> Trained:
    """The head of a classifier, on the base as it is."""
    if (objective := choose("auto", examples)).generates:
        raise GraftError(f"the base has all the outputs that {objective.name} needs, so there is no new head to train")
    return _adapted(replace(configuration, method="full"), examples, training)


def _full_fine_tuning(configuration: Configuration, examples: Examples, training: dict[str, Any]) -> Trained:
    """All parameters of the base itself: a copy beside it, as `full` makes, would part what is tied.

    Those of the plain base, since codes cannot be trained.
    """
    base = _loaded(replace(configuration, quantise=None), examples, training)
    base.model.requires_grad_(True)
    result = fit(
        base.model, examples, processor=base.processor, objective=base.objective or "auto",
        seed=configuration.seed, progress=False, **training,
    )  # fmt: skip
    return Trained(base, result)


CONTROLS: dict[str, Callable[[Configuration, Examples, dict[str, Any]], Trained]] = {
    "no-op": _no_op,
    "zero-shot": _zero_shot,
    "in-context": _in_context,
    "linear-probe": _linear_probe,
    "full-fine-tuning": _full_fine_tuning,
}
UNTRAINED = ("no-op", "zero-shot", "in-context")


def _loaded(
    configuration: Configuration, examples: Examples, training: dict[str, Any], device: str | None = None
) -> Base:
    objective = choose("auto", examples, architecture(configuration.base)).name
    base = load_base(
        configuration.base, objective=objective, examples=examples, dtype=DTYPE, device=device,
        quantise=configuration.quantise, seed=configuration.seed,
    )  # fmt: skip
    base.max_length = training.get("max_length")
    return base


def _validation_curve(history: Sequence[dict[str, Any]]) -> list[list[float]]:
    """[[step, seconds of training until then, loss], ...]"""
    spent, points = 0.0, []
    for entry in history:
        spent += entry.get("seconds", 0.0)
        if "validation" in entry:
            points.append([entry["step"], float(f"{spent:.6g}"), float(f"{entry['validation']['loss']:.6g}")])
    return points


def _latency(base: Base, adapted: bool, examples: Examples) -> dict[str, float | None]:
    """Seconds of a forward pass over one batch (median), with the adapter beside the base and merged into it."""
    task = choose(base.objective or "auto", examples, base.model)(
        base.model, base.processor, max_length=base.max_length
    )
    batch = on(base.model, task.collate(task.features(examples)))

    def seconds() -> float:
        took = []
        with evaluating(base.model), torch.no_grad():
            for _ in range(PASSES):
                begun = time.perf_counter()
                float(task.loss(base.model, batch)[0])  # waits for the device
                took.append(time.perf_counter() - begun)
        return statistics.median(took[1:])  # the first one warms up

    found = {"unmerged": seconds(), "merged": None}
    if not adapted:
        return found | {"merged": found["unmerged"]}
    with contextlib.suppress(GraftError):  # what is no change of weights
        merged = merge(base.model)
        found["merged"] = seconds()
        merged.undo()
    return found


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
