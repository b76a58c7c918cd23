"""graft combine: one adapter of several."""

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any

import typer

from ..core.errors import GraftError
from ..core.hyper import keywords
from ._combination import Format, Output, only, print_made, saved
from ._model import NAMED, adapted, model_settings
from ._output import Json, working
from ._settings import Setting, parameters, settings, values


def combine(
    model: Annotated[str, NAMED],
    adapters: Annotated[list[str], typer.Argument(metavar="ADAPTER=WEIGHT", help="Folders with their weights.")],
    output: Output,
    method: Annotated[str, typer.Option(help="sum, cat, ties, dare, dare_ties, magnitude, ...")] = "sum",
    format: Format = "graft",
    as_json: Json = False,
    **options: Any,
) -> None:
    """Combine saved adapters of MODEL into one: graft combine MODEL first=0.7 second=0.3 --output both.

    Ranks, alphas and methods of the adapters may differ; a weight of -1 subtracts. The result is exact, or the share
    of the change that it loses is reported.
    """
    with working():
        from ..compose.combine import combine as combined
        from ..core.files import load

        weights = [_weighted(text) for text in adapters]
        base, _ = adapted(model, weights[0][0], options)
        names = [only(base, weights[0][0])]
        for i, (folder, _) in enumerate(weights[1:], 2):
            names.append(f"{i}-{names[0]}")
            load(base.model, folder, name=names[-1], allow_other_base=bool(options.get("allow_other_base")))
        given = dict(zip(names, (weight for _, weight in weights)))
        done = combined(base.model, given, method, **values(_own_settings(), options))
        facts = saved(done, base, output, format)
    print_made(facts, as_json)


def options(args: Sequence[str]) -> list[inspect.Parameter]:
    return parameters([*model_settings(), *_own_settings()])


def _own_settings() -> list[Setting]:
    """Of all methods together: one refuses what is another's."""
    from ..compose import entrywise
    from ..compose.combine import combine as combined

    found: dict[str, Setting] = {}
    for name in entrywise.names():
        for option, hyper in keywords(entrywise.find(name)).items():
            said = found[option].help if option in found else hyper.doc
            default = "needed" if hyper.required else f"default {hyper.default}"
            found[option] = Setting(option, replace(hyper, default=None), f"{said}; {name}: {default}", "Options")
    return [*settings(combined, "Options"), *found.values()]


def _weighted(text: str) -> tuple[str, float]:
    """A folder and its weight."""
    folder, equals, weight = text.rpartition("=")
    try:
        return folder, float(weight if equals else "")
    except ValueError:
        raise GraftError(f"{text} must be an adapter with its weight, such as {folder or text}=0.5") from None
