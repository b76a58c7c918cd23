"""graft generate: let a language model write."""

import inspect
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from ._model import ADAPTER, NAMED, adapted, model_settings
from ._output import Json, print_json, working
from ._settings import parameters


def generate(
    model: Annotated[str, NAMED],
    prompt: Annotated[list[str], typer.Option(help="What to go on with; may be given repeatedly.")],
    adapter: Annotated[str | None, ADAPTER] = None,
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

    return parameters(model_settings(write))
