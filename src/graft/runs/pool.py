"""Many runs, each in a process of its own: one that dies takes no other with it, and memory is counted for each."""

import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from .configuration import Configuration
from .contestants import title
from .forks import Fork, Forks
from .single import failed
from .store import Record, Store

POLL = 0.05  # seconds between two looks at the processes


Tell = Callable[[list[Configuration], Record | None], None]


@dataclass
class _Child:
    configuration: Configuration
    process: Fork
    errors: Path
    begun: float
    late: bool = False  # ended because it took longer than it may


def run(
    configurations: Iterable[Configuration],
    folder: str | Path,
    *,
    jobs: int = 1,
    threads: int = 1,
    retry: bool = False,
    limit: float | None = None,
    until: float | None = None,
    progress: bool | Tell = True,
    within: Forks | None = None,
) -> list[Record]:
    """The records of the configurations, in their order; those which the folder has not are made.

    jobs      processes at a time
    threads   of each of them
    retry     make those again that failed
    limit     seconds that a run may take: then it is ended, and failed
    until     a time of `time.monotonic`, after which no run begins: those have no record
    progress  show on stderr how far it is; or what to call with the configurations that run, and a record that came
    within    what `forks` gave, for several calls; the threads are then those

    A run that fails, or whose process dies, gives a record with the reason, and the others go on. When this process
    ends, however it does, the others do too; what is not in the folder then is made by the next call.
    """
    store, wanted = Store(folder), list(configurations)
    missing = {c.id: c for c in wanted if (r := store.get(c)) is None or (retry and not r.done)}
    waiting, running = list(missing.values()), list[_Child]()
    own = nullcontext(within) if within else forks(threads)
    with _bar(len(missing), progress) as tell, tempfile.TemporaryDirectory() as place, own as source:
        while waiting or running:
            if until is not None and time.monotonic() >= until:
                waiting.clear()
            while waiting and len(running) < jobs:
                running.append(_start(waiting.pop(0), store, source, Path(place)))
                tell([c.configuration for c in running], None)
            for child in [c for c in running if c.process.poll() is not None]:
                running.remove(child)
                tell([c.configuration for c in running], _finish(child, store))
            for child in running:
                if limit is not None and not child.late and time.monotonic() - child.begun > limit:
                    child.late = True
                    child.process.kill()
            time.sleep(POLL)
    found = [store.get(c) for c in wanted]
    return [record for record in found if record]


def forks(threads: int = 1) -> closing[Forks]:
    """Where the processes of runs come from; each of them with so many threads."""
    source = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")]))
    own = {
        "PYTHONPATH": path, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false",
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # looking for a GPU must not begin to use it before the fork
    }  # fmt: skip
    return closing(Forks(os.environ | own))


def _start(configuration: Configuration, store: Store, source: Forks, place: Path) -> _Child:
    errors = place / configuration.id
    process = source.start(store.folder.absolute(), configuration.plain(), errors)
    return _Child(configuration, process, errors, time.monotonic())


def _finish(child: _Child, store: Store) -> Record:
    """The record of a process that has ended, made here if it left none."""
    code = child.process.poll()
    lines = child.errors.read_text(errors="replace").strip().splitlines() if child.errors.exists() else []
    record = store.get(child.configuration)
    if code and not (record and record.done):
        last = f": {lines[-1]}" if lines else ""
        took = time.monotonic() - child.begun
        died = f"ended with code {code}{last}" if code > 0 else f"was killed by {signal.Signals(-code).name}"
        hint = " (often because memory ran out)" if code == -9 else ""
        why = f"it took too long: it was ended after {took:.0f} s" if child.late else f"the process {died}{hint}"
        record = failed(child.configuration, why, took)
        store.put(record)
    assert record
    return record


@contextmanager
def _bar(total: int, progress: bool | Tell) -> Iterator[Tell]:
    """Something to tell which runs there are, and which one has ended: a bar on a terminal, lines elsewhere."""
    ended = []

    def lines(running: list[Configuration], record: Record | None) -> None:
        if record:
            ended.append(record)
            what = "done" if record.done else f"failed: {record.reason}"
            print(f"{len(ended)} of {total} runs: {called(record.configuration)} {what}", file=sys.stderr, flush=True)

    if callable(progress):
        yield progress
        return
    if not (progress and total and sys.stderr.isatty()):
        yield lines if progress else lambda running, record: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    console = Console(stderr=True, markup=False, highlight=False)
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as bar:
        shown = bar.add_task("", total=total)

        def live(running: list[Configuration], record: Record | None) -> None:
            if record and not record.done:
                console.print(f"{called(record.configuration)} failed: {record.reason}")
            now = ", ".join(map(called, running))
            bar.update(shown, advance=1 if record else 0, description=now)

        yield live


def called(c: Configuration) -> str:
    """A run in a line of text."""
    rate = c.training.get("learning_rate")
    return f"{c.task} {title(c.method, c.options)}{'' if rate is None else f' {rate:g}'} seed {c.seed}"
