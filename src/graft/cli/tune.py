"""graft tune: train an adapter."""

import inspect
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from itertools import chain
from typing import Annotated, Any

import typer

from ..core.errors import GraftError
from ._model import DATA, NAMED
from ._output import Json, figure, print_facts, print_json, print_table, working
from ._settings import Setting, method_settings, parameters, read_recipe, settings, write_recipe

PLACES = ("output", "resume")  # of what a dry run does not write
PARTS = {
    "weights": "weights of the base", "adapter": "adapter", "gradients": "gradients",
    "optimizer": "state of the optimizer", "saved": "saved for the backward pass", "temporary": "temporary",
}  # fmt: skip


def tune(
    model: Annotated[str | None, NAMED] = None,
    data: Annotated[str | None, DATA] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(help="How to adapt; `graft methods` lists them. Several are trained together. (default: lora)"),
    ] = None,
    recipe: Annotated[str | None, typer.Option(metavar="FILE", help="YAML with the names of these options.")] = None,
    save_recipe: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write all settings of this run there.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what the run would take and how long, and train nothing.")
    ] = False,
    as_json: Json = False,
    **options: Any,
) -> None:
    """Train an adapter for MODEL on data and save it.

    What to learn follows from the columns of the data: text and label, prompt and completion, messages, text, input and
    target, or image and label. Options win over the recipe.

    `graft tune --method NAME --help` shows the options of a method; those that several methods have in common get its
    name: --method lora --method dora --lora.rank 4 --dora.rank 8. The first method is the innermost of the chain.
    """
    with working():
        from ..core.recipe import Recipe
        from ..prediction import predict_cost
        from ..training.messages import nearest
        from ..tuning import tune as train

        given = {} if recipe is None else read_recipe(recipe)
        methods = method or _listed(given.get("method"))
        texts = {"model": model, "data": data}
        of_method, others = _settings(methods)
        known = {s.name: s for s in [*chain.from_iterable(of_method.values()), *others]}
        if unknown := given.keys() - {*known, *texts, "method"}:
            name = min(unknown)
            raise GraftError(f"{recipe}: there is no setting {name!r}: {nearest(name, {*known, *texts, 'method'})}")
        texts |= {s.name: s.given(options) for s in known.values()}
        given |= {name: text for name, text in texts.items() if text is not None}
        if missing := [n for n in ("model", "data", *([] if dry_run else ["output"])) if n not in given]:
            raise GraftError(f"{missing[0]} is missing: graft tune MODEL --data FILE --output FOLDER")
        values = {name: s.read(given[name]) for name, s in known.items() if name in given}
        chosen = [
            Recipe.of(name, **{s.hyper.name: values.pop(s.name) for s in own if s.name in values})
            for name, own in of_method.items()
        ]
        source, data = given["model"], given["data"]
        complete = {"model": source, "data": data, "method": methods[0] if len(methods) == 1 else methods}
        complete |= {s.name: r.hyper[s.hyper.name] for r, own in zip(chosen, of_method.values()) for s in own}
        complete |= {s.name: values.get(s.name, s.hyper.default) for s in others if s.name not in ("output", "resume")}
        if save_recipe:
            write_recipe(save_recipe, complete)
        cost = done = None
        if dry_run:
            cost = predict_cost(source, data, method=chosen, **{k: v for k, v in values.items() if k not in PLACES})
        else:
            done = train(source, data, method=chosen, **values)
            write_recipe(f"{values['output']}/recipe.yaml", complete)
    if done is None:
        return _print_cost(cost, as_json)
    result, adapters = done.result, done.adapters.values()
    trained = sum(p.numel() for adapter in adapters for p in adapter.parameters())
    base = sum(p.numel() for p in done.base.model.parameters()) - trained
    facts = {
        "model": source,
        "method": complete["method"],
        "objective": done.adapter.task["objective"],
        "sites": sum(len(adapter.deltas) - len(adapter.heads) for adapter in adapters),
        "heads": [path for adapter in adapters for path, _ in adapter.heads],
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


def _print_cost(cost: Any, as_json: bool) -> None:
    """Sizes in MiB for people, in bytes for machines."""
    if as_json:
        return print_json({**asdict(cost), "seconds": cost.seconds})
    rows = [*((PARTS[part], size) for part, size in cost.parts.items()), ("together, at the peak", cost.peak)]
    print_table([(part, figure(size, 2**20, "{:,.1f} MiB")) for part, size in rows], ("memory", ""), "A dry run")
    rows, tokens = cost.batch
    print_facts({
        "largest batch": f"{rows} examples" + (f" of up to {tokens} tokens" if tokens > 1 else ""),
        "before training": figure(cost.start, 2**20, "{:,.1f} MiB at most"),
        "trained parameters": cost.parameters,
        "saved": figure(cost.file, 2**10, "{:,.1f} KiB"),
        "a step": f"{cost.step_seconds:.3g} s, {'measured' if cost.measured else 'estimated'}",
        "all steps": f"{cost.steps:,}: {cost.seconds:,.0f} s, if all batches were so large",
    })  # fmt: skip


def options(args: Sequence[str]) -> list[inspect.Parameter]:
    """All settings of a run, those of the method that `args` name among them."""
    methods, recipes = _values(args, "--method"), _values(args, "--recipe")
    if not methods:
        methods = _listed(read_recipe(recipes[-1]).get("method") if recipes else None)
    of_method, others = _settings(methods)
    return parameters([*chain.from_iterable(of_method.values()), *others])


def _values(args: Sequence[str], option: str) -> list[str]:
    """What `args` say after each occurrence of the option."""
    pairs = zip(args, [*args[1:], ""])
    found = [after if arg == option else arg.partition("=")[2] for arg, after in pairs if arg.split("=")[0] == option]
    return [value for value in found if value]


def _listed(method: Any) -> list[str]:
    """The methods that a recipe names."""
    return [str(m) for m in method] if isinstance(method, list) and method else [str(method or "lora")]


def _settings(methods: Sequence[str]) -> tuple[dict[str, list[Setting]], list[Setting]]:
    """The settings of each method, and all others."""
    from ..core.hyper import hyperparameters
    from ..core.recipe import method as called
    from ..training import fit
    from ..tuning import tune as train

    others = settings(train, "Model and adapter", ["method"])
    others += settings(fit, "Training", [*(s.name for s in others), "progress"])
    taken = {*(s.name for s in others), *inspect.signature(tune).parameters}
    if twice := next((m for m in methods if methods.count(m) > 1), None):
        raise GraftError(f"the method {twice} is named twice: graft.tune in Python takes a list [graft.LoRA(), ...]")
    classes = [called(m) for m in methods]
    names = Counter(name for cls in classes for name in hyperparameters(cls))
    taken |= {name for name, count in names.items() if count > 1}
    return {cls.name: method_settings(cls, taken) for cls in classes}, others
