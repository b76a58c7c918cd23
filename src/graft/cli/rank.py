"""graft rank: which base model to adapt."""

import inspect
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from ._model import DATA
from ._output import Json, figure, print_json, print_table, working
from ._settings import Setting, parameters, settings, values

MODELS = typer.Argument(help="Folders, model ids of the hub, or graft:NAME.")


def rank(
    models: Annotated[list[str], MODELS],
    data: Annotated[str, DATA],
    as_json: Json = False,
    **options: Any,
) -> None:
    """Rank base models by the loss foretold for training on all of the data, from runs on few rows.

    Each is trained on ever fewer rows until its losses leave a line in log-log space, and the line is extended to all
    rows. The loss is in nats a row of the data, so that models with different tokenizers compare. Stopped, it goes on
    with the same command.
    """
    with working():
        from ..ranking import rank as library

        found = library(models, data, **values(_settings(), options))
    if as_json:
        return print_json([{**vars(r), "line": r.line and r.line._asdict()} for r in found])
    sizes = sorted({n for r in found for n in r.measured}, reverse=True)
    rows = [
        (r.base, figure(r.foretold, 1, "{:.3f}"), r.learning_rate, r.line and r.line.accepted,
         *(figure(r.measured.get(n), 1, "{:.3f}") for n in sizes), r.failure or "")
        for r in found
    ]  # fmt: skip
    heads = ("base", "foretold", "learning rate", "on the line", *(f"{n} rows" for n in sizes), "")
    print_table(rows, heads, f"Loss in nats a row of {data}")


def options(args: Sequence[str]) -> list[inspect.Parameter]:
    return parameters(_settings())


def _settings() -> list[Setting]:
    from ..ranking import rank as library

    return settings(library, "Runs", ["progress"])
