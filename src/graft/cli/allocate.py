"""graft allocate: which base and method, and how many steps, with so much compute."""

import inspect
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from ._model import DATA
from ._output import Json, figure, print_json, print_table, working
from ._settings import Setting, parameters, settings, values

MODELS = typer.Argument(help="Folders, model ids of the hub, or graft:NAME; of several sizes.")


def allocate(
    models: Annotated[list[str], MODELS],
    data: Annotated[str, DATA],
    as_json: Json = False,
    **options: Any,
) -> None:
    """Foretell which base, method and number of steps give the lowest loss with so much compute, from small runs.

    The runs take 1/4, 1/8 and 1/16 of the compute each, and lines through the best of them in log-log space are
    extended to all of it. The loss is in nats a row of the data. Stopped, it goes on with the same command.
    """
    with working():
        from ..allocation import allocate as library

        found = library(models, data, **values(_settings(), options))
    if as_json:
        lines = [a.frontier and {k: v._asdict() for k, v in a.frontier._asdict().items()} for a in found]
        return print_json([{**vars(a), "frontier": of} for a, of in zip(found, lines)])
    at = sorted({c for a in found for c in a.measured or ()})
    rows = [
        (a.method, figure(a.foretold, 1, "{:.3f}"), a.base, a.steps, figure(a.epochs, 1, "{:.2f}"), a.learning_rate,
         *(figure(((a.measured or {}).get(c) or (None, None))[1], 1, "{:.3f}") for c in at), a.failure or "")
        for a in found
    ]  # fmt: skip
    heads = ("method", "foretold", "base", "steps", "epochs", "learning rate", *(f"{c:.3g} FLOP" for c in at), "")
    print_table(rows, heads, f"Loss in nats a row of {data}")


def options(args: Sequence[str]) -> list[inspect.Parameter]:
    return parameters(_settings())


def _settings() -> list[Setting]:
    from ..allocation import allocate as library

    return settings(library, "Runs", ["progress"])
