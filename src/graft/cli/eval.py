"""graft eval: measure a model."""

import inspect
from collections.abc import Sequence
from typing import Annotated, Any

from ._model import ADAPTER, DATA, NAMED, adapted, model_settings
from ._output import Json, print_facts, print_json, working
from ._settings import parameters


def eval(
    model: Annotated[str, NAMED],
    data: Annotated[str, DATA],
    adapter: Annotated[str | None, ADAPTER] = None,
    as_json: Json = False,
    **options: Any,
) -> None:
    """Measure MODEL with an adapter on data; without --adapter, the base model itself."""
    with working():
        from ..training import evaluate

        base, chosen = adapted(model, adapter, options, evaluate)
        metrics = evaluate(base.model, data, **(base.arguments() | chosen))
    if as_json:
        return print_json(metrics)
    print_facts(metrics, f"{adapter or model} on {data}")


def options(args: Sequence[str]) -> list[inspect.Parameter]:
    from ..training import evaluate

    return parameters(model_settings(evaluate))
