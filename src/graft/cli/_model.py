"""What the commands share that use a model with an adapter."""

from collections.abc import Callable
from typing import Annotated, Any

import typer

from ._settings import Setting, settings

Model = Annotated[str, typer.Argument(help="A folder, a model id of the hub, or a base that ships.")]
Adapter = Annotated[str | None, typer.Option(help="A folder, or an id on the hub; ours or Hugging Face PEFT's.")]
Data = Annotated[str, typer.Option(help="A file, a folder, or owner/name of a data set on the hub.")]


def model_settings(function: Callable | None = None) -> list[Setting]:
    """How to load a model with an adapter, and what a `function` of the library takes beside that."""
    from ..training import fit
    from ..tuning import load_adapted

    known = settings(load_adapted, "Model")
    return known if function is None else known + settings(function, "Options", [s.name for s in known], like=fit)


def adapted(model: str, adapter: str | None, options: dict[str, Any], function: Callable | None = None) -> Any:
    """The base with the adapter on it, and the options for `function`."""
    from ..tuning import load_adapted

    known = model_settings(function)
    values = {s.name: s.read(options[s.key]) for s in known if options.get(s.key) is not None}
    own = {s.name for s in model_settings()}
    base = load_adapted(model, adapter, **{k: v for k, v in values.items() if k in own})
    return base, {k: v for k, v in values.items() if k not in own}
