"""graft merge: a plain checkpoint."""

import inspect
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from ._model import ADAPTER, NAMED, adapted, model_settings
from ._output import Json, print_facts, print_json, print_table, working
from ._settings import parameters


def merge(
    model: Annotated[str, NAMED],
    adapter: Annotated[str, ADAPTER],
    output: Annotated[str, typer.Option(metavar="FOLDER", help="Where to write; it must not exist.")],
    as_json: Json = False,
    **options: Any,
) -> None:
    """Write MODEL with the adapter merged in as a plain checkpoint that needs no Graft.

    Rounding to the precision of the base loses a part of the change; the report says how much of it. --dtype float32
    keeps it. An adapter of a quantised base is merged into the weights that its codes stand for.
    """
    with working():
        from ..core.dequantise import dequantise
        from ..models import save_merged

        base, _ = adapted(model, adapter, options)
        dequantise(base.model)
        lost = save_merged(base.model, output, base.processor)
    worst = max(lost, key=lambda path: lost[path])
    dtype = str(base.model.dtype).removeprefix("torch.")
    if as_json:
        return print_json({"output": output, "dtype": dtype, "modules": len(lost), "worst": worst, "lost": lost})
    print_table([(path, f"{share:.2%}") for path, share in lost.items()], ("module", "of its change lost to rounding"))
    print_facts({"output": output, "dtype": dtype, "modules": len(lost), "worst": f"{worst}, {lost[worst]:.2%}"})


def options(args: Sequence[str]) -> list[inspect.Parameter]:
    return parameters(model_settings())
