"""graft compare: which method, at which cost, on this model and this data."""

import inspect
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from ._model import DATA
from ._output import Json, figure, print_facts, print_json, print_table, spread, working
from ._settings import Setting, parameters, settings, values

NAMED = typer.Option(help="A folder, a model id of the hub, or graft:NAME (graft bases).")


def compare(
    model: Annotated[str, NAMED],
    data: Annotated[str, DATA],
    as_json: Json = False,
    **options: Any,
) -> None:
    """Train several methods on a model and data with the same number of steps, and compare quality and cost.

    Controls are always part of it: full fine-tuning, a linear probe or the base as it is, and a no-op. Learning rates
    are chosen on the validation split, and several seeds are measured on the test split. The folder --output gets
    report.html, results.json, results.parquet and a record of every run; stopped, it goes on with --resume.
    """
    with working():
        from ..comparison import compare as library

        found = library(model, data, **values(_settings(), options))
    page = found.folder / "report.html"
    if as_json:
        facts = {"settings": found.settings, "target": found.target, "predicts": found.predicts, "unfit": found.unfit}
        facts |= {"screened": found.screened, "contestants": found.rows, "sizes": found.sizes, "report": str(page)}
        return print_json(facts)
    metrics = list(next((r["test"] for r in found.rows if r["test"]), {}))
    shown = [
        (r["method"], *(spread(r["test"].get(m)) for m in metrics), len(r["seeds"]), r["learning_rate"],
         r["parameters"], figure(r["step"], 1e-3, "{:.0f} ms"), figure(r["time_to_target"], 1, "{:.1f} s"),
         figure(r["peak_memory"], 2**20, "{:,.0f} MiB"), figure(r["adapter_bytes"], 2**10, "{:,.0f} KiB"),
         figure(r["forgetting"], 1, "{:+.3f}"), "" if r["control"] else ", ".join(r["not_above"]),
         [f"{count} failed: {why}" for why, count in r["failures"].items()])
        for r in found.rows
    ]  # fmt: skip
    heads = ("seeds", "learning rate", "parameters", "step", "to target", "memory", "saved", "forgetting")
    print_table(shown, ("method", *metrics, *heads, "not shown to beat", ""), f"{data} on {model}")
    together = [r["method"] for r in found.rows if r["tie"]]
    facts = {
        "steps of a run": found.settings["steps"],
        "cannot be told from the best": together,
        "validation loss ranks the runs": found.predicts and found.predicts["rank_correlation"],
        "left out after a screening": [r["method"] for r in found.screened if not r["compared"]],
        "not part of it": [f"{name}: {why}" for name, why in found.unfit.items()],
        "report": str(page),
    }
    print_facts(facts)


def options(args: Sequence[str]) -> list[inspect.Parameter]:
    return parameters(_settings())


def _settings() -> list[Setting]:
    from ..comparison import compare as library

    return settings(library, "Comparison", ["progress"])
