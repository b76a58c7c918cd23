"""What a command prints: its result on stdout, as a table or as JSON; everything else on stderr."""

import contextlib
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ..core.disk import replace

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@contextlib.contextmanager
def working() -> Iterator[None]:
    """While a command works, what libraries print goes to stderr: stdout is for results."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def print_json(result: Any) -> None:
    """One JSON document on stdout."""
    from ..catalogue import plain

    print(json.dumps(plain(result), indent=2, ensure_ascii=False))


def print_table(rows: Iterable[Sequence[Any]], columns: Sequence[str], title: str | None = None) -> None:
    """A table as wide as the terminal, or as wide as it needs to be where there is none."""
    from rich import box
    from rich.table import Table

    head = any(columns)
    table = Table(
        *columns, title=title, title_justify="left", title_style="bold", show_header=head, box=box.SIMPLE_HEAD
    )
    for row in rows:
        table.add_row(*(_cell(v) for v in row))
    console().print(table)


def print_facts(facts: dict[str, Any], title: str | None = None) -> None:
    """A result with named values, one a line; what is empty is left out."""
    print_table([(k, v) for k, v in facts.items() if v not in (None, "", [], {})], ("", ""), title)


def write_whole(path: str | Path, text: str) -> None:
    """A file that is complete or as it was: written beside its place and renamed."""
    replace(Path(path).expanduser(), text.encode())


def write_lines(path: str | Path, rows: Iterable[Any]) -> None:
    """JSON lines."""
    from ..catalogue import plain

    write_whole(path, "".join(f"{json.dumps(plain(row), ensure_ascii=False)}\n" for row in rows))


def console() -> Any:
    """A console on stdout without markup: texts hold square brackets. Pipes and files get no wrapped lines."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else 200
    return Console(width=width, markup=False, highlight=False, emoji=False)


def spread(found: dict[str, Any] | None) -> str:
    """Mean and standard deviation."""
    if not found:
        return ""
    return f"{found['mean']:.3f}" + ("" if found["sd"] is None else f" ± {found['sd']:.3f}")


def figure(value: float | None, unit: float, form: str) -> str:
    """A number in a unit, or nothing."""
    return "" if value is None else form.format(value / unit)


def _cell(value: Any) -> Any:
    from rich.text import Text

    return Text(_words(value))


def _words(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, dict):
        return ", ".join(f"{k} {_words(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_words, value))
    return str(value)
