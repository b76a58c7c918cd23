"""How well `graft.predict_cost` predicts memory: every method, beside what its first steps really take.

    python benchmarks/prediction.py [METHOD ...] [--json benchmarks/prediction.json]
    python docs/generate.py      # writes docs/prediction.md from that file

Without METHOD all of the catalogue are run; the rows of those named replace theirs in the file. Each method with its
defaults, on the first two steps of a run, 8 examples each: graft:minilm classifies chapters of 128 tokens,
graft:seedling rewrites; in fp32 and bf16 (the base stored in it), with and without checkpointing. One thread.

predicted  the peak of `predict_cost`: tensors without contents, weights included
tensors    the most bytes that tensors took at a time, as torch's profiler counts what its allocator gives, and the
           weights of the base
process    the growth of the process's peak over what it held before the base was loaded: all of the above, what
           libraries allocate past torch, and what the allocator of the system holds back
"""

import argparse
import contextlib
import gc
import json
import multiprocessing
import os
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

import graft
from graft import methods
from graft.catalogue import catalogue
from graft.prediction import DRY, Rehearsal
from graft.training.data import read
from graft.training.evaluation import choose
from graft.training.report import PeakMemory
from harness import machine, most_allocated

RUNS = {"graft:minilm": ("task:chapters", {"max_length": 128}), "graft:seedling": ("task:rewrites", {})}
OPTIONS = {"tokens": dict(tokens=tuple(range(8)))}  # where a method has no default
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
STEPS = 100


def measure(name: str, model: str, precision: str, checkpointing: bool) -> dict:
    """Predicted and measured."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    methods.load()
    data, settings = RUNS[model]
    settings = settings | dict(steps=STEPS, checkpointing=checkpointing)
    recipe = graft.Recipe.of(name, **OPTIONS.get(name, {}))
    row: dict = {"method": name, "model": model, "precision": precision, "checkpointing": checkpointing}
    try:
        cost = graft.predict_cost(model, data, method=recipe, dtype=DTYPES[precision], measure=False, **settings)
    except graft.GraftError as error:
        return row | {"refused": str(error)}
    gc.collect()
    held = _resident()
    examples = read(data)
    kind = choose("auto", examples, "")
    base = graft.load_base(model, objective=kind.name, examples=examples, dtype=DTYPES[precision])
    weights = sum(t.nbytes for t in {t.data_ptr(): t for t in (*base.model.parameters(), *base.model.buffers())}.values())
    run = Rehearsal(
        base, kind, examples, settings, method=recipe, targets=None, heads=None,
        seed=0, examples_for_statistics=64,
    )  # fmt: skip
    peak = PeakMemory(torch.device("cpu"))

    def steps() -> None:
        run.adapt(base)
        run.fit(base.model, DRY)

    if os.environ.get("PROCESS"):
        steps()
        return row | {"predicted": cost.peak, "process": peak.bytes() - held}
    tensors = weights + most_allocated(steps)
    return row | {"predicted": cost.peak, "tensors": tensors, "parts": dict(cost.parts), "batch": list(cost.batch)}


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
