"""What the commands share that use a model with an adapter."""

from collections.abc import Callable
from typing import Any

import typer

from ._settings import Setting, settings, values

NAMED = typer.Argument(metavar="MODEL", help="A folder, a model id of the hub, or graft:NAME (graft bases).")
DATA = typer.Option(help="A file, a folder, owner/name of a data set on the hub, or task:NAME (graft tasks).")
ADAPTER = typer.Option(help="A folder, or an id on the hub; ours or Hugging Face PEFT's.")


def model_settings(function: Callable | None = None) -> list[Setting]:
    """How to load a model with an adapter, and what a `function` of the library takes beside that."""
    from ..training import fit
    from ..tuning import load_adapted

    known = settings(load_adapted, "Model")
    return known if function is None else known + settings(function, "Options", [s.name for s in known], like=fit)


def adapted(model: str, adapter: str | None, options: dict[str, Any], function: Callable | None = None) -> Any:
    """The base with the adapter on it, and the options for `function`."""
    from ..tuning import load_adapted

    given, own = values(model_settings(function), options), {s.name for s in model_settings()}
    base = load_adapted(model, adapter, **{k: v for k, v in given.items() if k in own})
    return base, {k: v for k, v in given.items() if k not in own}
