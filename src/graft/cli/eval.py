"""graft eval: measure a model."""

import inspect
from collections.abc import Sequence
from typing import Any

from ._model import Adapter, Data, Model, adapted, model_settings
from ._output import Json, print_facts, print_json, working


def eval(model: Model, data: Data, adapter: Adapter = None, as_json: Json = False, **options: Any) -> None:
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

    return [s.parameter() for s in model_settings(evaluate)]
