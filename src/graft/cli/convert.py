"""graft convert: another method's adapter that does the same."""

import inspect
from collections.abc import Sequence
from typing import Annotated, Any

from ._combination import Format, Output, only, print_made, saved
from ._model import ADAPTER, NAMED, adapted, model_settings
from ._output import Json, working
from ._settings import parameters


def convert(
    model: Annotated[str, NAMED],
    adapter: Annotated[str, ADAPTER],
    output: Output,
    format: Format = "graft",
    as_json: Json = False,
    **options: Any,
) -> None:
    """Make a LoRA of a saved adapter of MODEL, whatever its method, as far as its changes of weights are of low rank.

    The share of the change that is lost is reported; without --rank the rank is that which loses nothing.
    """
    with working():
        from ..compose.combine import convert as converted

        base, own = adapted(model, adapter, options, converted)
        facts = saved(converted(base.model, only(base, adapter), **own), base, output, format)
    print_made(facts, as_json)


def options(args: Sequence[str]) -> list[inspect.Parameter]:
    from ..compose.combine import convert as converted

    return parameters(model_settings(converted))
