"""Measuring in turns: every contestant runs once a round, and only ratios within a round count."""

import gc
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._C._profiler import _EventType


def machine(threads: int | None = None) -> str:
    """One line about where a table was made."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            name = next((line.split(":", 1)[1].strip() for line in f if line.startswith("model name")), name)
    except OSError:
        pass
    count = threads or torch.get_num_threads()
    return f"{name}, {count} thread(s), Python {platform.python_version()}, torch {torch.__version__}"


def in_turns(
    steps: dict[str, Callable[[], object]], rounds: int, warmup: int = 2, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """{name: seconds of each round} by `clock`. The order turns by one place a round."""
    names = list(steps)
    times: dict[str, list[float]] = {name: [] for name in names}
    for i in range(-warmup, rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            gc.disable()
            start = clock()
            steps[name]()
            taken = clock() - start
            gc.enable()
            if i >= 0:
                times[name].append(taken)
    return times


def ratio(times: dict[str, list[float]], name: str, to: str) -> float:
    """The median over rounds of time(name) / time(to)."""
    return statistics.median(a / b for a, b in zip(times[name], times[to]))


def kept_for_backward(model: nn.Module, forward: Callable[[], torch.Tensor]) -> int | None:
    """Bytes in distinct storages saved for backward by one forward, without those of parameters and buffers.

    None where a sparse tensor is kept: it has no storage.
    """
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    sizes: dict[int, int] = {}
    sparse, alive = [], []  # alive, or a freed storage's address could be taken again and counted once

    def pack(t):
        if t.layout != torch.strided:
            sparse.append(t)
            return t
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
            alive.append(storage)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        forward()
    return None if sparse else sum(sizes.values())


def most_allocated(step: Callable[[], object]) -> int:
    """The most bytes that `step` had allocated at a time on the CPU, beside those that were there before it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as found:
        step()
    recorded: Any = found.profiler
    waiting, totals = list(recorded.kineto_results.experimental_event_tree()), [0]
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.tag == _EventType.Allocation:  # its total is right even where the profiler drops events
            totals.append(event.extra_fields.total_allocated)
    return max(totals)


def table(rows: list[dict], columns: list[str]) -> str:
    """A Markdown table; empty cells where a row lacks a column."""
    cells = [[_cell(row.get(c)) for c in columns] for row in rows]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in cells])


def _cell(value) -> str:
    return "" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)
