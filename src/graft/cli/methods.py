"""graft methods: the catalogue."""

from typing import Annotated

import typer

from ._output import Json, print_json, print_table, working


def methods(
    family: Annotated[
        str | None,
        typer.Option(metavar="FAMILY", help="Only this family: weight, activation, prompt, selection, other."),
    ] = None,
    as_json: Json = False,
) -> None:
    """List the methods with what they compute, where they work and which paper they come from.

    `graft show NAME` tells all about one of them.
    """
    with working():
        from ..catalogue import catalogue

        found = catalogue(family)
    if as_json:
        return print_json(found)
    rows = [
        (m["name"], m["family"], m["summary"], m["hosts"], m["mergeable"], m["needs"],
         [f"{p['authors']}, {p['year']}" for p in m["papers"][:1]])
        for m in found
    ]  # fmt: skip
    print_table(rows, ("method", "family", "what it computes", "hosts", "merges", "needs", "paper"))
    print(f"{len(found)} methods; graft show NAME tells all about one")
