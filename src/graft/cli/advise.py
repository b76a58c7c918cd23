"""graft advise: which methods to try, from what was measured, without training."""

import inspect
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from ._output import Json, figure, print_facts, print_json, print_table, working
from ._settings import Setting, parameters, settings, values

MODEL = typer.Argument(help="A folder, a model id of the hub, or graft:NAME; it is looked at, not trained.")
DATA = typer.Option(help="task:NAME, a file, a folder, or owner/name on the hub; or name an --objective.")


def advise(
    model: Annotated[str | None, MODEL] = None,
    data: Annotated[str | None, DATA] = None,
    as_json: Json = False,
    **options: Any,
) -> None:
    """Name the methods to try first, with the evidence for each, and say what is not known. Nothing is trained.

    The evidence are the tables of the proving ground: reference runs on tasks with the same objective.
    """
    with working():
        from ..advice import advise as library
        from ..runs.single import CONTROLS

        found = library(model, data, **values(_settings(), options))
    if as_json:
        return print_json(vars(found) | {"recommendations": [vars(r) for r in found.recommendations]})
    rows = [
        (r.method, f"{r.tied} of {r.of}", f"{r.quality:.2f}", r.learning_rate, r.parameters,
         figure(r.adapter_bytes, 2**10, "{:,.0f} KiB"), figure(r.step, 1, "{:.2f}"), figure(r.kept, 1, "{:.2f}"))
        for r in found.recommendations
    ]  # fmt: skip
    heads = ("method", "among the best", "quality", "learning rate", "parameters", "saved", "step", "kept")
    if rows:
        print_table(rows, heads, f"To try first for {found.objective}")
    for r in found.recommendations:
        print_facts({str(i): line for i, line in enumerate(r.evidence, 1)}, f"Evidence for {r.method}")
    first = next((r for r in found.recommendations if r.learning_rate and r.method not in CONTROLS), None)
    print_facts(
        {
            "begin with": first
            and f"graft tune {model or 'MODEL'} --data {data or 'DATA'} --method {first.method} "
            f"--learning-rate {first.learning_rate:g} --output my-adapter",
            "not known": found.unknown,
            "left out": [f"{name}: {why}" for name, why in found.left_out.items()],
            "papers report": [f"{claim} ({source})" for claim, source in found.reported],
        }
    )


def options(args: Sequence[str]) -> list[inspect.Parameter]:
    return parameters(_settings())


def _settings() -> list[Setting]:
    from ..advice import advise as library

    return settings(library, "Limits", [])
