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

    Without a family the initialisations of low-rank methods and the scores that choose entries of matrices follow.
    `graft show NAME` tells all about one method or initialisation.
    """
    with working():
        from ..catalogue import catalogue, initialisations, scores

        found = catalogue(family)
        starts, choices = ([], []) if family else (initialisations(), scores())
    if as_json:
        return print_json({"methods": found} | ({} if family else {"initialisations": starts, "scores": choices}))
    rows = [
        (m["name"], m["family"], m["summary"], m["hosts"], m["mergeable"], m["needs"],
         [f"{p['authors']}, {p['year']}" for p in m["papers"][:1]])
        for m in found
    ]  # fmt: skip
    print_table(rows, ("method", "family", "what it computes", "hosts", "merges", "needs", "paper"))
    if starts:
        rows = [(i["name"], i["summary"], i["needs"], i["methods"]) for i in starts]
        print_table(rows, ("initialisation", "what it computes", "needs", "of methods"), "--init")
        rows = [
            (s["name"], s["formula"], s["needs"], [f"{m} --{key}" for m, key in s["methods"].items()]) for s in choices
        ]
        print_table(rows, ("score", "of an entry of W", "needs", "a choice of"), "Chosen entries")
    print(f"{len(found)} methods; graft show NAME tells all about one")
