"""graft predict: what a model says about each example."""

import inspect
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from ..core.errors import GraftError
from ._model import ADAPTER, DATA, NAMED, adapted, model_settings
from ._output import Json, print_json, print_table, working, write_lines
from ._settings import parameters


def predict(
    model: Annotated[str, NAMED],
    adapter: Annotated[str | None, ADAPTER] = None,
    data: Annotated[str | None, DATA] = None,
    text: Annotated[list[str] | None, typer.Option(help="Instead of data: one text; may be given repeatedly.")] = None,
    output: Annotated[str | None, typer.Option(metavar="FILE", help="Write JSON lines there, one an example.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Of models that write: longest answer, in tokens (default: 128).")
    ] = None,
    as_json: Json = False,
    **options: Any,
) -> None:
    """Predict with MODEL and an adapter: a label with its probability, a number, or a text for each example."""
    with working():
        from ..training import objectives, read
        from ..training import predict as say

        if (data is None) == (not text):
            raise GraftError("name what to predict for: --data FILE or --text TEXT, one of the two")
        base, chosen = adapted(model, adapter, options, say)
        arguments = base.arguments() | chosen
        if text and arguments["objective"] == "auto":
            raise GraftError("what the model is for is not known: add --objective, such as classification")
        if data is not None:
            examples = read(data, split="test", columns=arguments.pop("columns", None))
        else:
            kind = objectives.find(arguments["objective"])
            examples = [{kind.columns[0][0]: t} for t in text or ()]
        writes: dict[str, Any] = {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}
        predictions = say(base.model, examples, **arguments, **writes)
    rows = [{**given, "prediction": said} for given, said in zip(examples, predictions)]
    if output is not None:
        write_lines(output, rows)
    if as_json:
        return print_json(predictions)
    if output is None:
        flat = [p if isinstance(p, dict) else {"prediction": p} for p in predictions]
        print_table([(i, *p.values()) for i, p in enumerate(flat)], ("example", *flat[0]))
    else:
        print(f"{len(rows):,} predictions in {output}")


def options(args: Sequence[str]) -> list[inspect.Parameter]:
    from ..training import predict as say

    return parameters(model_settings(say))
