"""How well `graft.predict_cost` predicts memory: every method, beside what its first steps really take.

    python benchmarks/prediction.py [METHOD ...] [--whole] [--json benchmarks/prediction.json]
    python docs/generate.py      # writes docs/prediction.md from that file

Without METHOD all of the catalogue are run; the rows of those named replace theirs in the file. Each method has its
defaults, in the first two steps of a run of 100 with 8 examples each, of 256; in fp32, and in bf16 (the base stored in
it), with and without checkpointing; one thread. The base is graft:seedling with the first two of its six layers, on
task:rewrites; with --whole, all of graft:seedling, and graft:minilm on task:chapters with 128 tokens.

predicted  the peak of `predict_cost`: tensors without contents, those of the base included
tensors    the most bytes that tensors took at a time while it trained: those of base and adapter, and what torch's
           allocator gave, as its profiler says
process    with --whole, in a process of its own: by how much its peak while it trained lies above what it held before
           the base was loaded. That counts what libraries take past torch's allocator, and what that one keeps back
"""

import argparse
import gc
import json
import multiprocessing
import os
import tempfile
import warnings
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch.utils.checkpoint import CheckpointError

import graft
from graft import methods
from graft.catalogue import catalogue
from graft.core.recipe import Recipe
from graft.prediction import DRY, Rehearsal
from graft.training.data import read
from graft.training.evaluation import choose
from graft.training.report import PeakMemory
from harness import machine, most_allocated

WHOLE = {"graft:seedling": ("task:rewrites", {}), "graft:minilm": ("task:chapters", {"max_length": 128})}
CUT, LAYERS = "graft:seedling, 2 layers", 2
OPTIONS = {"tokens": dict(tokens=tuple(range(8)))}  # where a method has no default
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
STEPS, ROWS = 100, 256


def cut(folder: str) -> None:
    """The base with fewer layers, as a folder."""
    base = graft.load_base("graft:seedling")
    base.model.model.layers = base.model.model.layers[:LAYERS]
    base.model.config.num_hidden_layers = LAYERS
    base.model.save_pretrained(folder)
    base.processor.save_pretrained(folder)


def measure(name: str, model: str, place: str, precision: str, checkpointing: bool, process: bool) -> dict:
    """A row of the file."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    methods.load()
    task, settings = WHOLE[model.split(",")[0]]
    rows: Any = read(task)
    examples = rows.select(list(range(ROWS)))
    settings = settings | dict(steps=STEPS, checkpointing=checkpointing)
    recipe, dtype = Recipe.of(name, **OPTIONS.get(name, {})), DTYPES[precision]
    row: dict = dict(method=name, model=model, precision=precision, checkpointing=checkpointing, machine=machine(1))
    try:
        cost = graft.predict_cost(place, examples, method=recipe, dtype=dtype, measure=False, **settings)
    except (graft.GraftError, CheckpointError) as error:  # the run itself would raise the same
        return row | {"refused": str(error).splitlines()[0]}
    row |= {"predicted": cost.peak, "parts": dict(cost.parts), "batch": list(cost.batch)}
    kind = choose("auto", examples, "")
    gc.collect()
    held = _resident()
    base = graft.load_base(place, objective=kind.name, examples=examples, dtype=dtype)
    run = Rehearsal(
        base, kind, examples, settings, method=recipe, targets=None, heads=None, seed=0, examples_for_statistics=64
    )
    run.adapt(base)
    if not process:
        own = {t.data_ptr(): t.nbytes for t in (*base.model.parameters(), *base.model.buffers())}
        return row | {"tensors": sum(own.values()) + most_allocated(lambda: run.fit(base.model, DRY))}
    gc.collect()
    peak = PeakMemory(torch.device("cpu"))
    run.fit(base.model, DRY)
    return row | {"process": (peak.bytes() or 0) - held}


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*")
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--json", type=Path, default=Path(__file__).with_name("prediction.json"))
    args = parser.parse_args()
    names = args.methods or [m["name"] for m in catalogue()]
    known = json.loads(args.json.read_text()) if args.json.exists() else []
    rows = {_key(row): row for row in known}
    with tempfile.TemporaryDirectory() as folder:
        if not args.whole:
            cut(folder)
        models = {model: model for model in WHOLE} if args.whole else {CUT: folder}
        ways = product(models, (False, True), DTYPES, (False, True) if args.whole else (False,), names)
        for model, checkpointing, precision, process, name in track(
            list(ways), "measuring ", transient=True, console=Console(stderr=True)
        ):
            given = name, model, models[model], precision, checkpointing, process
            row = _apart(given) if process else measure(*given)
            rows[_key(row)] = row if "refused" in row else _others(rows.get(_key(row), {})) | row
            args.json.write_text(json.dumps([rows[k] for k in sorted(rows)], indent=1) + "\n")
            found = {k: round(row["predicted"] / row[k], 3) for k in ("tensors", "process") if k in row}
            print(name, model, precision, "checkpointing" * checkpointing, row.get("refused", found), flush=True)


def _apart(given: tuple) -> dict:
    with multiprocessing.get_context("spawn").Pool(1) as pool:  # a fork would find memory that its parent gave back
        return pool.apply(measure, given)


def _others(row: dict) -> dict:
    """What an earlier measurement found, where it was not refused."""
    return {k: v for k, v in row.items() if k != "refused"}


def _key(row: dict) -> tuple:
    return row["method"], row["model"], row["precision"], row["checkpointing"]


if __name__ == "__main__":
    main()
