"""graft tasks: data that is always at hand, and how methods do on it."""

import inspect
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import typer

from ..core.errors import GraftError
from ._output import Json, figure, print_facts, print_json, print_table, spread, working
from ._settings import Setting, parameters, settings, values


def tasks(
    action: Annotated[
        Literal["list", "show", "run"],
        typer.Argument(help="List all tasks, show the data card of one, or train methods on it and compare them."),
    ] = "list",
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="A task, with knobs if any: rewrites,rules=64.")
    ] = None,
    as_json: Json = False,
    **options: Any,
) -> None:
    """List the tasks, which are data for every command: --data task:rewrites, or with knobs task:rewrites,rules=64.

    `graft tasks show NAME` makes the rows of one and shows its data card: what is in it, where it is from, sizes,
    examples, the metric and what the commonest answer gets. `split=NAME` among the knobs names a split: without it tune
    takes train, and eval and predict take test.

    `graft tasks run NAME` trains each method with several learning rates, chooses one on the validation split, and
    measures with that on the test split over several seeds; `graft tasks run --help` shows its options. Stopped, it
    goes on with the same command: no run is made twice.
    """
    with working():
        from .. import tasks as library

        if (action == "list") == (name is not None):
            raise GraftError("graft tasks lists them, graft tasks show NAME shows one, graft tasks run NAME uses it")
        made = library.parse(name)[0] if name else None
        found: Any = (
            _summaries(made, options) if action == "run" else library.card(made) if made else library.catalogue()
        )
    if action == "run":
        return print_json([summary.row() for summary in found]) if as_json else _print_summaries(found)
    if as_json:
        return print_json(found)
    if made is None:
        rows = [(t["name"], t["summary"], t["metrics"], t["licence"]) for t in found]
        print_table(rows, ("task", "what is asked", "metric", "licence"))
        return print(f"{len(rows)} tasks; graft tasks show NAME tells all about one")
    facts = {k: found[k] for k in ("version", "sources", "licence", "labels", "metrics", "baseline", "fingerprint")}
    facts |= {f"{r['method']}, {r['base']}": {k: spread(v) for k, v in r["test"].items()} for r in found["references"]}
    print_facts(facts, made.name)
    print(f"{found['doc']}\n")
    print_table(
        [(k, found["sizes"][k], said) for k, said in found["splits"].items()], ("split", "rows", "what it holds")
    )
    knobs = [(k["name"], found["values"][k["name"]], k["range"] or k["choices"], k["meaning"]) for k in found["knobs"]]
    print_table(knobs, ("knob", "value", "values", "meaning"))
    for example in found["examples"]:
        print_facts({k: _short(v) for k, v in example.items()}, "An example of train")


def options(args: Sequence[str]) -> list[inspect.Parameter]:
    return parameters(_settings()) if "run" in args else []


def _settings() -> list[Setting]:
    from ..runs.reference import reference

    return settings(reference, "Runs", ["progress"])


def _summaries(made: Any, options: dict[str, Any]) -> list[Any]:
    from ..runs.reference import reference

    return reference(made, **values(_settings(), options))


def _print_summaries(found: list[Any]) -> None:
    from ..runs.summary import measured

    rows, metrics = [s.row() for s in found], measured(found[0].setting)
    shown = [
        (r["method"], *(spread(r["test"].get(m)) for m in metrics), len(r["seeds"]), _rate(r), r["parameters"],
         figure(r["training"], 1, "{:.0f} s"), figure(r["step"], 1e-3, "{:.0f} ms"),
         figure(r["peak_memory"], 2**20, "{:,.0f} MiB"), figure(r["adapter_bytes"], 2**10, "{:,.0f} KiB"),
         [f"{count} failed: {reason}" for reason, count in r["failures"].items()])
        for r in rows
    ]  # fmt: skip
    heads = ("seeds", "learning rate", "parameters", "training", "step", "memory", "adapter", "")
    print_table(shown, ("method", *metrics, *heads), f"{rows[0]['task']} on {rows[0]['base']}")


def _rate(row: dict[str, Any]) -> str:
    """The chosen rate, marked where the grid ends."""
    rate = row["learning_rate"]
    return "" if rate is None else f"{rate:g}{' (end of the grid)' if row['at_end_of_grid'] else ''}"


def _short(value: Any) -> str:
    """As Python writes it, cut off."""
    text = repr(value)
    return text if len(text) <= 300 else f"{text[:300]} ..."
