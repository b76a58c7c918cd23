"""graft search: which configuration, within a budget and limits."""

import inspect
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from ..core.errors import GraftError
from ._model import DATA
from ._output import Json, figure, print_facts, print_json, print_table, spread, working
from ._settings import Setting, parameters, read_recipe, settings, values

NAMED = typer.Option(help="A folder, a model id of the hub, or graft:NAME (graft bases).")


def search(
    model: Annotated[str, NAMED],
    data: Annotated[str, DATA],
    space: Annotated[
        list[str] | None,
        typer.Option(
            help="A method with what to try of it; may be given repeatedly: lora(rank=4|8|16), "
            "lora(rank=4:64) on attention|mlp, lora(rank=0|4|8 per block), pfeiffer(size=0|16)+ia3 in any blocks."
        ),
    ] = None,
    recipe: Annotated[str | None, typer.Option(metavar="FILE", help="YAML with the names of these options.")] = None,
    as_json: Json = False,
    **options: Any,
) -> None:
    """Search for the best configuration of methods, ranks, targets and learning rates on a model and data.

    Every run is judged on the validation split; the best, or the Pareto front of several objectives, is run again with
    several seeds on the test split. The folder --output gets report.html, results.json and a record of every run;
    stopped, it goes on with --resume. Options win over the recipe.
    """
    with working():
        from ..searching import search as library
        from ..training.messages import nearest

        known = {s.name: s for s in _settings()}
        given = {} if recipe is None else read_recipe(recipe)
        if unknown := given.keys() - {*known, "space"}:
            raise GraftError(
                f"{recipe}: there is no setting {min(unknown)!r}: {nearest(min(unknown), [*known, 'space'])}"
            )
        chosen = {name: known[name].read(value) for name, value in given.items() if name != "space"}
        chosen |= values(known.values(), options)
        if wanted := space or given.get("space"):
            chosen["space"] = wanted
        found = library(model, data, **chosen)
    page = found.folder / "report.html"
    if as_json:
        return print_json({
            "settings": found.settings, "objective": found.objective, "verdict": found.verdict, "best": found.best,
            "trials": found.rows, "report": str(page),
        })  # fmt: skip
    metrics = list(found.best[0]["test"])
    shown = [
        (b["title"], b["targets"], b["training"]["learning_rate"], *(spread(b["test"].get(m)) for m in metrics),
         len(b["seeds"]), b["parameters"], figure(b["memory"], 2**20, "{:,.0f} MiB"),
         figure(b["seconds"], 1, "{:.1f} s"))
        for b in found.best
    ]  # fmt: skip
    heads = ("seeds", "parameters", "memory", "training")
    print_table(shown, ("configuration", "targets", "learning rate", *metrics, *heads), f"{data} on {model}")
    states = [r["status"] for r in found.rows]
    facts = {
        "runs": states.count("done"),
        "not started": states.count("refused"),
        "failed": states.count("failed"),
        "ended because": found.verdict,
        "judged by": found.objective,
        "quality": "the validation loss, since the task has no metric" if metrics == ["loss"] else metrics[0],
        "report": str(page),
    }
    print_facts(facts)


def options(args: Sequence[str]) -> list[inspect.Parameter]:
    return parameters(_settings())


def _settings() -> list[Setting]:
    from ..searching import search as library

    return settings(library, "Search", ["progress", "space"])
