"""What a run tells: a progress bar or lines, `history.jsonl`, trackers; and how much memory it took."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

QUIET = 2.0  # seconds: what is over sooner shows nothing
EVERY = 30.0  # seconds between two lines where there is no terminal


class Report:
    """The history of a run, kept in memory, on disk and at the trackers. Only the main process shows and writes."""

    def __init__(
        self, accelerator: Any, total: int, *, output: Path | None, progress: bool, history: list[dict],
        watch: Callable[[dict[str, Any]], Any] | None = None,
    ):  # fmt: skip
        self.main, self.accelerator, self.total = accelerator.is_main_process, accelerator, total
        self.history, self.progress, self.bar = history, progress and self.main, None
        self.begun = self.told = time.monotonic()
        self.watch = watch if self.main else None
        self.file = None
        if output and self.main:  # a run that goes on from a checkpoint may have written more than it kept
            output.mkdir(parents=True, exist_ok=True)
            path, aside = output / "history.jsonl", output / ".history.jsonl.aside"
            with open(aside, "w") as file:
                file.writelines(json.dumps(r) + "\n" for r in history)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
            self.file = open(path, "a", buffering=1)  # noqa: SIM115 (closed by close)

    def add(self, record: dict[str, Any]) -> None:
        """One step, or one evaluation (its metrics under "validation")."""
        self.history.append(record)
        if self.file:
            self.file.write(json.dumps(record) + "\n")
        flat = {k: v for k, v in record.items() if isinstance(v, int | float) and k != "step"}
        flat |= {f"validation/{k}": v for k, v in record.get("validation", {}).items()}
        self.accelerator.log(flat, step=record["step"])
        if self.watch:
            self.watch(record)
        if self.progress:
            self._show(record)

    def _show(self, record: dict[str, Any]) -> None:
        now, step = time.monotonic(), record["step"]
        if now - self.begun < QUIET:
            return
        said = (
            f"loss {record['loss']:.4g}"
            if "loss" in record
            else ", ".join(f"{k} {v:.4g}" for k, v in record["validation"].items())
        )
        if sys.stdout.isatty():
            if self.bar is None:
                from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

                columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
                self.bar = Progress(*columns)
                self.bar.add_task("training", total=self.total)
                self.bar.start()
            if "validation" in record:
                self.bar.console.print(f"step {step}: {said}")
            self.bar.update(self.bar.task_ids[0], completed=step, description=said if "loss" in record else None)
        elif "validation" in record or now - self.told > EVERY:
            self.told = now
            print(f"step {step} of {self.total}: {said}", flush=True)

    def flush(self) -> int:
        """Put the history onto the disk, and say how many records it has."""
        if self.file:
            os.fsync(self.file.fileno())
        return len(self.history)

    def close(self) -> None:
        if self.bar:
            self.bar.stop()
        if self.file:
            self.file.close()
        for tracker in self.accelerator.trackers:
            tracker.finish()


class PeakMemory:
    """The most memory in use since construction, in bytes: of the accelerator, or of the process on a CPU.

    A process counts everything it holds, the model and the interpreter too. Where the system does not let the count be
    set back (anything but Linux), it is the highest since the process began.
    """

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        elif device.type == "cpu":
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")

    def bytes(self) -> int | None:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        if self.device.type != "cpu":
            return None
        try:
            status = Path("/proc/self/status").read_text()
            return 1024 * int(status.split("VmHWM:")[1].split()[0])
        except (OSError, IndexError):
            return _highest()


def _highest() -> int | None:
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
