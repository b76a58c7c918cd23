"""graft extract: the adapter between two checkpoints."""

import inspect
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from ._combination import Format, Output, print_made, saved
from ._model import NAMED
from ._output import Json, working
from ._settings import Setting, parameters, settings, values


def extract(
    model: Annotated[str, NAMED],
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="The model that was made of it by training.")],
    output: Output,
    objective: Annotated[
        str | None, typer.Option(help="What TUNED is for; by default what its checkpoint says.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16 or float16.")] = "auto",
    format: Format = "graft",
    as_json: Json = False,
    **options: Any,
) -> None:
    """Make an adapter of MODEL out of what changed between it and TUNED.

    The share of the change that is lost is reported; without --rank all of it is kept.
    """
    with working():
        from ..compose.extract import extract as extracted
        from ..models import load_base
        from ..training import objectives

        other = load_base(tuned, objective=objective, dtype=dtype)
        known = objectives.find(objective).configured if objective else ()
        config = {key: getattr(other.model.config, key) for key in known}
        base = load_base(model, objective=objective, config=config, dtype=dtype)
        given: dict[str, Any] = {"heads": base.heads}
        done = extracted(base.model, other.model, **given | values(_own_settings(), options))
        if objective:
            done.adapter.task = {"objective": objective, "config": config, "max_length": None}
        facts = saved(done, base, output, format)
    print_made(facts, as_json)


def options(args: Sequence[str]) -> list[inspect.Parameter]:
    return parameters(_own_settings())


def _own_settings() -> list[Setting]:
    from ..compose.extract import extract as extracted

    return settings(extracted, "Options")
