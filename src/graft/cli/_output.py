"""What a command prints: its result on stdout, as a table or as JSON; everything else on stderr."""

import contextlib
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any

import typer

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

    table = Table(*columns, title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for row in rows:
        table.add_row(*(_cell(v) for v in row))
    console().print(table)


def print_facts(facts: dict[str, Any], title: str | None = None) -> None:
    """A result with named values, one a line."""
    print_table(facts.items(), ("", ""), title)


def console() -> Any:
    """A console on stdout without markup: texts hold square brackets. Pipes and files get no wrapped lines."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else 200
    return Console(width=width, markup=False, highlight=False, emoji=False)


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
    if isinstance(value, list | tuple):
        return ", ".join(map(_words, value))
    return str(value)
