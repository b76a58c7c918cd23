"""graft bases: base models that are always at hand."""

from typing import Annotated, Any, Literal

import typer

from ..core.errors import GraftError
from ._output import Json, print_facts, print_json, print_table, working


def bases(
    action: Annotated[
        Literal["list", "show"], typer.Argument(help="List all bases, or show the card of one.")
    ] = "list",
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="With show: a base.")] = None,
    as_json: Json = False,
) -> None:
    """List the bases, which are models for every command: graft tune graft:minilm --data task:chapters ...

    `graft bases show NAME` shows the card of one: the data it was trained on, how, what was measured beside which
    baselines, the loss over the steps, its files. Whatever loads a base checks the SHA-256 of its files.
    """
    with working():
        from .. import bases as library
        from ..bases.card import curve

        if (action == "show") != (name is not None):
            raise GraftError("graft bases lists them, graft bases show NAME shows one")
        found: Any = library.describe(library.find(name)) if name else library.catalogue()
    if as_json:
        return print_json(found)
    if name is None:
        rows = [
            (b["id"], b["kind"], b["parameters"], b["summary"], b["licence"], "no" if b["missing"] else "yes")
            for b in found
        ]
        print_table(rows, ("base", "kind", "parameters", "what it is", "licence", "installed"))
        for base in found:
            if base["missing"]:
                print(base["missing"])
        return print(f"{len(rows)} bases; graft bases show NAME tells all about one")
    print_facts({k: found[k] for k in ("version", "kind", "parameters", "licence", "missing")}, found["id"])
    print(f"{found['doc']}\n")
    further = dict.fromkeys(k for entry in found["data"] for k in entry)
    print_table([[entry.get(k) for k in further] for entry in found["data"]], list(further), "Data")
    for part in ("training", "measured"):
        if found[part]:
            print_facts(found[part], part.capitalize())
    for line in curve(found):
        print(line)
    print_table(found["files"].items(), ("file", "SHA-256"))
