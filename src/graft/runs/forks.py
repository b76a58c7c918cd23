"""Processes that begin with all libraries imported: forked from one that has imported them, where there is fork."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..core.errors import GraftError

PROGRAM = ("-m", "graft.runs")
POLL = 0.02  # seconds between two looks at what has ended


class Forks:
    """A process to fork from, begun with the first run, and anew should it die.

    All that it began ends when this process does, however that ends.
    """

    process: subprocess.Popen | None = None

    def __init__(self, environment: Mapping[str, str]):
        if not hasattr(os, "fork"):
            raise GraftError(f"runs are forked, which {sys.platform} cannot do: use Linux or macOS")
        self.environment = environment
        self.codes: dict[int, int | None] = {}

    def _begin(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *PROGRAM], env=self.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, start_new_session=True,  # an interruption at the terminal is for this one alone
        )  # fmt: skip
        assert self.process.stdin and self.process.stdout
        self.requests, self.answers = self.process.stdin, _Lines(self.process.stdout.fileno())

    def start(self, folder: Path, configuration: Mapping[str, Any], errors: Path) -> "Fork":
        """Begin a run, which writes its record into `folder` and what it says to the file `errors`."""
        self.look()
        if self.process is None or self.process.returncode is not None:
            self.close()
            self._begin()
        number = len(self.codes)
        self.codes[number] = None
        self.ask({"number": number, "folder": str(folder), "configuration": configuration, "errors": str(errors)})
        return Fork(self, number)

    def ask(self, what: Mapping[str, Any]) -> None:
        with contextlib.suppress(BrokenPipeError):  # `look` will see it
            self.requests.write(json.dumps(what).encode() + b"\n")
            self.requests.flush()

    def look(self) -> None:
        """Note what has ended; when the process itself has, all."""
        if self.process is None:
            return
        while self.answers.open and (lines := self.answers.read(0)):
            for number, code in (map(int, line.split()) for line in lines):
                self.codes[number] = code
        if not self.answers.open and self.process.returncode is None:
            code = self.process.wait()
            self.codes = {n: code if c is None else c for n, c in self.codes.items()}

    def close(self) -> None:
        """End it and what still runs."""
        if self.process is None:
            return
        self.process.kill()
        self.process.wait()
        with contextlib.suppress(BrokenPipeError):
            self.requests.close()
        if self.process.stdout:
            self.process.stdout.close()


class Fork:
    """One run."""

    def __init__(self, of: Forks, number: int):
        self.of, self.number = of, number

    def poll(self) -> int | None:
        """Its exit status once it has ended; below 0 the signal that ended it."""
        self.of.look()
        return self.of.codes[self.number]

    def kill(self) -> None:
        self.of.ask({"kill": self.number})


def serve(threads: int) -> None:
    """Begin a run for each line that is read, or kill one; write the number of each that has ended, with its status."""
    import torch

    torch.set_num_threads(threads)
    alive, held = os.pipe()  # which all children see end when this process does
    requests, running, ready = _Lines(0), dict[int, int](), False
    while requests.open:
        for line in map(json.loads, requests.read(POLL)):
            if "kill" in line:
                for pid in [pid for pid, number in running.items() if number == line["kill"]]:
                    os.kill(pid, signal.SIGKILL)
                continue
            ready = ready or _import(line)
            if pid := os.fork():
                running[pid] = line["number"]
            else:
                os.close(held)
                threading.Thread(target=_watch, args=(alive,), daemon=True).start()
                os._exit(_run(line))
        for pid in list(running):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                os.write(1, f"{running.pop(pid)} {os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


def _import(wanted: dict[str, Any]) -> bool:
    """Import what runs need, by loading the base and the data of one: much is imported only when it is used.

    On the CPU: what has begun to use an accelerator cannot be forked.
    """
    import accelerate  # noqa: F401

    from .configuration import Configuration
    from .single import load

    with contextlib.suppress(Exception):  # the run itself will say it
        load(Configuration.of(wanted["configuration"]), device="cpu")
    return True


class _Lines:
    """Whole lines of a file descriptor, as they come."""

    def __init__(self, source: int):
        self.source, self.rest, self.open = source, b"", True

    def read(self, wait: float) -> list[bytes]:
        if not select.select([self.source], [], [], wait)[0]:
            return []
        new = os.read(self.source, 2**16)
        self.open = bool(new)
        *lines, self.rest = (self.rest + new).split(b"\n")
        return lines


def _watch(alive: int) -> None:
    os.read(alive, 1)
    os._exit(1)


def _run(wanted: dict[str, Any]) -> int:
    import traceback

    import torch

    # The first call makes torch a thread pool in the place of the one that a fork cannot take along. Were that left to
    # the threads of a run, one of them could meet none ("Invalid thread pool!").
    torch.set_num_threads(torch.get_num_threads())
    from .configuration import Configuration
    from .single import perform
    from .store import Store

    said = os.open(wanted["errors"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    none = os.open(os.devnull, os.O_RDWR)
    for target, source in ((0, none), (1, none), (2, said)):
        os.dup2(source, target)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        Store(wanted["folder"]).put(perform(Configuration.of(wanted["configuration"])))
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0
