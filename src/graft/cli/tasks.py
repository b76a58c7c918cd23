"""graft tasks: data that is always at hand."""

from typing import Annotated, Any, Literal

import typer

from ..core.errors import GraftError
from ._output import Json, print_facts, print_json, print_table, working


def tasks(
    action: Annotated[
        Literal["list", "show"], typer.Argument(help="List all tasks, or show the data card of one.")
    ] = "list",
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="With show: a task, with knobs if any: rewrites,rules=64.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the tasks, which are data for every command: --data task:rewrites, or with knobs task:rewrites,rules=64.

    `graft tasks show NAME` makes the rows of one and shows its data card: what is in it, where it is from, sizes,
    examples, the metric and what the commonest answer gets. `split=NAME` among the knobs names a split: without it tune
    takes train, and eval and predict take test.
    """
    with working():
        from .. import tasks as library

        if (action == "show") != (name is not None):
            raise GraftError("graft tasks lists them, graft tasks show NAME shows one")
        made = library.parse(name)[0] if name else None
        found: Any = library.card(made) if made else library.catalogue()
    if as_json:
        return print_json(found)
    if made is None:
        rows = [(t["name"], t["summary"], t["metrics"], t["licence"]) for t in found]
        print_table(rows, ("task", "what is asked", "metric", "licence"))
        return print(f"{len(rows)} tasks; graft tasks show NAME tells all about one")
    facts = {k: found[k] for k in ("version", "sources", "licence", "labels", "metrics", "baseline", "fingerprint")}
    print_facts(facts, made.name)
    print(f"{found['doc']}\n")
    print_table(
        [(k, found["sizes"][k], said) for k, said in found["splits"].items()], ("split", "rows", "what it holds")
    )
    knobs = [(k["name"], found["values"][k["name"]], k["range"] or k["choices"], k["meaning"]) for k in found["knobs"]]
    print_table(knobs, ("knob", "value", "values", "meaning"))
    for example in found["examples"]:
        print_facts({k: _short(v) for k, v in example.items()}, "An example of train")


def _short(value: Any) -> str:
    """As Python writes it, cut off."""
    text = repr(value)
    return text if len(text) <= 300 else f"{text[:300]} ..."
