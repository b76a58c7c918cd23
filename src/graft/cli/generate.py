"""graft generate: let a language model write."""

import inspect
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from ._model import Adapter, Model, adapted, model_settings
from ._output import Json, print_json, working


def generate(
    model: Model,
    prompt: Annotated[list[str], typer.Option(help="What to go on with; may be given repeatedly.")],
    adapter: Adapter = None,
    as_json: Json = False,
    **options: Any,
) -> None:
    """Let MODEL with an adapter write on after a prompt, or answer it with --chat.

    It takes the likeliest token each time, unless --temperature, --top-k or --top-p asks for samples.
    """
    with working():
        from ..tuning import generate as write

        base, chosen = adapted(model, adapter, options, write)
        texts = write(base, prompt, **chosen)
    if as_json:
        return print_json([{"prompt": p, "text": t} for p, t in zip(prompt, texts)])
    for text in texts:
        print(text)


def options(args: Sequence[str]) -> list[inspect.Parameter]:
    from ..tuning import generate as write

    return [s.parameter() for s in model_settings(write)]
