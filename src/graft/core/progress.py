"""A progress bar for what takes long."""

import sys
import time
from collections.abc import Generator, Sequence
from typing import Any

QUIET = 2.0  # seconds: what is over sooner shows nothing


def shown(items: Sequence[Any], what: str) -> Generator[Any, None, None]:
    """The items; on a terminal with a bar, where going through them takes longer than `QUIET`."""
    begun, bar = time.monotonic(), None
    try:
        for done, item in enumerate(items):
            if bar is None and time.monotonic() - begun > QUIET and sys.stderr.isatty():
                from rich.console import Console
                from rich.progress import Progress

                bar = Progress(console=Console(stderr=True))
                bar.add_task(what, total=len(items))
                bar.start()
            if bar is not None:
                bar.update(bar.task_ids[0], completed=done)
            yield item
    finally:
        if bar is not None:
            bar.stop()
