"""What was measured of the methods, as it ships: the tables of the reference runs, and what a step costs.

`python docs/generate.py` writes the file from the records in `benchmarks`.
"""

import functools
import importlib.resources
import json
from typing import Any

FILE = "evidence.json"
REFERENCES = ("full-fine-tuning", "linear-probe", "zero-shot")


@functools.cache
def tables() -> list[dict[str, Any]]:
    """One a task, its knobs and a base.

    task, knobs, base   what was measured on; knobs: those that are not the default
    objective           such as "classification"
    train_rows          of the train split, None where that depends on the interpreter
    steps, batch_size   of every run
    floor               {metric: value} of who always gives the commonest answer of the train split
    rows                one a contestant, as `graft.runs.summary.Summary.row` gives it, and `tie`: whether it cannot be
                        told from the best mean of the first metric
    """
    return _content()["tables"]


@functools.cache
def costs() -> dict[str, dict[str, float]]:
    """{method: {"step", "kept"}}: time of a step and bytes kept for backward, as multiples of those of LoRA."""
    return _content()["costs"]


def of(task: str) -> list[dict[str, Any]]:
    """What a task names as its published references: these rows of its tables with the default knobs."""
    return [r for t in tables() if t["task"] == task and not t["knobs"] for r in t["rows"] if r["method"] in REFERENCES]


def _content() -> dict[str, Any]:
    return json.loads(importlib.resources.files("graft").joinpath(FILE).read_text(encoding="utf-8"))
