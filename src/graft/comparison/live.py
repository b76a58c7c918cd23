"""The table while a comparison runs."""

import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from ..runs.configuration import Configuration
from ..runs.contestants import title
from ..runs.pool import called
from ..runs.store import Record
from ..runs.summary import measured


class Live:
    """On a terminal a table with a line for each contestant; elsewhere a line for each run that ends; on stderr."""

    def __init__(self, *, enabled: bool):
        self.enabled, self.table = enabled, enabled and sys.stderr.isatty()
        self.phase, self.total, self.ended = "short runs", 0, 0
        self.seen: dict[str, dict[str, Any]] = {}
        self.running: list[Configuration] = []
        self.display: Any = None

    def __enter__(self) -> "Live":
        if self.table:
            from rich.console import Console
            from rich.live import Live as Display

            self.display = Display(console=Console(stderr=True, markup=False, highlight=False), refresh_per_second=4)
            self.display.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.display:
            self.display.stop()

    def expect(self, phase: str, wanted: Sequence[Configuration]) -> None:
        """What comes now; nothing where it is not known yet."""
        self.phase, self.total, self.ended = phase, len(wanted), 0
        for c in wanted:
            self.seen.setdefault(title(c.method, c.options), {})
        self._show()

    def tell(self, running: list[Configuration], record: Record | None) -> None:
        """What `graft.runs.pool.run` says."""
        self.running = running
        if record:
            self.ended += 1
            self._take(record)
        self._show()

    def _take(self, record: Record) -> None:
        c = record.configuration
        name, metric = title(c.method, c.options), measured(c)[0]
        what = "done" if record.done else f"failed: {record.reason}"
        line = self.seen.setdefault(name, {})
        line["runs"] = line.get("runs", 0) + 1
        if not record.done:
            line["failed"] = record.reason
        for split in ("validation", "test"):
            if split in record.metrics:
                line.setdefault(split, []).append(record.metrics[split][metric])
                what += f", {metric} {record.metrics[split][metric]:.3f} on {split}"
        if not c.splits and (points := record.figures.get("validation")):
            what += f", validation loss {points[-1][2]:.3f}"
        if self.enabled and not self.display:
            print(f"{self.phase}, {self._far()}: {called(c)} {what}", file=sys.stderr, flush=True)

    def _far(self) -> str:
        """How far it is; of a search it is not known how many there will be."""
        return f"{self.ended}{f' of {self.total}' if self.total else ''}"

    def _show(self) -> None:
        if not self.display:
            return
        from rich.table import Table

        now = {title(c.method, c.options) for c in self.running}
        table = Table("contestant", "runs", "validation", "test", "", title=f"{self.phase}: {self._far()}")
        for name, line in self.seen.items():
            scores = ["  ".join(f"{v:.3f}" for v in line.get(split, [])) for split in ("validation", "test")]
            state = "running" if name in now else f"failed: {line['failed']}" if "failed" in line else ""
            table.add_row(name, str(line.get("runs", 0)), *scores, state)
        self.display.update(table)
