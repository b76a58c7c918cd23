"""graft tune: train an adapter."""

import inspect
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from ..core.errors import GraftError
from ._model import DATA, NAMED
from ._output import Json, print_facts, print_json, working
from ._settings import Setting, method_settings, parameters, read_recipe, settings, write_recipe


def tune(
    model: Annotated[str | None, NAMED] = None,
    data: Annotated[str | None, DATA] = None,
    method: Annotated[
        str | None, typer.Option(help="How to adapt; `graft methods` lists them. (default: lora)")
    ] = None,
    recipe: Annotated[str | None, typer.Option(metavar="FILE", help="YAML with the names of these options.")] = None,
    save_recipe: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write all settings of this run there.")
    ] = None,
    as_json: Json = False,
    **options: Any,
) -> None:
    """Train an adapter for MODEL on data and save it.

    What to learn follows from the columns of the data: text and label, prompt and completion, messages, text, input and
    target, or image and label. Options win over the recipe.

    `graft tune --method NAME --help` shows the options of a method.
    """
    with working():
        from ..core.recipe import Recipe
        from ..training.messages import nearest
        from ..tuning import tune as train

        given = {} if recipe is None else read_recipe(recipe)
        texts = {"model": model, "data": data, "method": method}
        method = str(method or given.get("method") or "lora")
        of_method, others = _settings(method)
        known = {s.name: s for s in [*of_method, *others]}
        if unknown := given.keys() - {*known, *texts}:
            name = min(unknown)
            raise GraftError(f"{recipe}: there is no setting {name!r}: {nearest(name, {*known, *texts})}")
        texts |= {s.name: s.given(options) for s in known.values()}
        given |= {name: text for name, text in texts.items() if text is not None}
        if missing := [name for name in ("model", "data", "output") if name not in given]:
            raise GraftError(f"{missing[0]} is missing: graft tune MODEL --data FILE --output FOLDER")
        values = {name: s.read(given[name]) for name, s in known.items() if name in given}
        hyper = {s.hyper.name: values.pop(s.name) for s in of_method if s.name in values}
        chosen = Recipe.of(method, **hyper)
        source, data = given["model"], given["data"]
        complete = {"model": source, "data": data, "method": method}
        complete |= {s.name: chosen.hyper[s.hyper.name] for s in of_method}
        complete |= {s.name: values.get(s.name, s.hyper.default) for s in others if s.name not in ("output", "resume")}
        if save_recipe:
            write_recipe(save_recipe, complete)
        done = train(source, data, method=chosen, **values)
        write_recipe(f"{values['output']}/recipe.yaml", complete)
    result, adapter = done.result, done.adapter
    trained = sum(p.numel() for p in adapter.parameters())
    base = sum(p.numel() for p in done.base.model.parameters()) - trained
    facts = {
        "model": source,
        "method": method,
        "objective": adapter.task["objective"],
        "sites": len(adapter.deltas) - len(adapter.heads),
        "heads": [path for path, _ in adapter.heads],
        "trained parameters": trained,
        "base parameters": base,
        "steps": result.steps,
        "best step": result.best_step,
        "loss": next((r["loss"] for r in reversed(result.history) if "loss" in r), None),
        "validation": result.metrics,
        "step seconds": result.step_seconds,
        "peak memory (bytes)": result.peak_memory,
        "output": values["output"],
    }
    if as_json:
        return print_json(facts | {"history": result.history, "labels": result.labels})
    print_facts(facts, "The adapter")


def options(args: Sequence[str]) -> list[inspect.Parameter]:
    """All settings of a run, those of the method that `args` name among them."""
    method = _value(args, "--method")
    recipe = _value(args, "--recipe")
    if method is None and recipe is not None:
        method = read_recipe(recipe).get("method")
    of_method, others = _settings(method or "lora")
    return parameters([*of_method, *others])


def _value(args: Sequence[str], option: str) -> str | None:
    for arg, after in zip(args, [*args[1:], None]):
        if arg == option:
            return after
        if arg.startswith(f"{option}="):
            return arg.partition("=")[2]
    return None


def _settings(method: str) -> tuple[list[Setting], list[Setting]]:
    """The settings of the method, and all others."""
    from ..core.recipe import method as called
    from ..training import fit
    from ..tuning import tune as train

    others = settings(train, "Model and adapter", ["method"])
    others += settings(fit, "Training", [*(s.name for s in others), "progress"])
    taken = {*(s.name for s in others), *inspect.signature(tune).parameters}
    return method_settings(called(method), taken), others
