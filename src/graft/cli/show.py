"""graft show: one method, initialisation, adapter or model in full."""

from pathlib import Path
from typing import Annotated

import typer

from ..core.errors import GraftError
from ._output import Json, print_facts, print_json, print_table, working
from ._settings import split


def show(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="A method, an initialisation, an adapter folder or file, or a model.")
    ],
    targets: Annotated[str | None, typer.Option(help="Of a model: the modules that these targets pick.")] = None,
    method: Annotated[str, typer.Option(help="Of a model: for which method.")] = "lora",
    as_json: Json = False,
) -> None:
    """Show all about a method or an initialisation, what an adapter folder holds, or what targets pick in a model."""
    with working():
        kind, facts = _facts(name, targets, method)
    if as_json:
        return print_json({"kind": kind, **facts})
    if kind in ("method", "initialisation"):
        rows = ("class", "family", "hosts", "targets", "mergeable", "needs", "taken_off", "starts_as_base", "methods")
        print_facts({row.replace("_", " "): facts[row] for row in rows if row in facts}, name)
        print(f"{facts['doc']}\n\n{facts['known']}\n")
        for paper in facts["papers"]:
            print(f"{paper['authors']}, {paper['year']}: {paper['title']}. {paper['url']}")
        values = [[*h["type"], *map(repr, h["choices"])] for h in facts["hyperparameters"]]
        rows = [
            (h["name"], "required" if h["required"] else str(h["default"]), " or ".join(v), h["range"], h["meaning"])
            for h, v in zip(facts["hyperparameters"], values)
        ]
        if rows:
            print_table(rows, ("hyperparameter", "default", "type", "range", "meaning"))
    elif kind == "adapter":
        _print_adapter(facts, name)
    elif kind == "adapters":
        rows = [(f["name"], f["method"], f["active"], f["sites"], f["parameters"]) for f in facts["adapters"]]
        print_table(rows, ("adapter, innermost first", "method", "runs", "sites", "parameters"), name)
        for one in facts["adapters"]:
            _print_adapter(one, f"{name}/{one['name']}")
    else:
        print_facts({k: facts[k] for k in ("class", "parameters")}, name)
        rows = [
            (p, len(paths), f"{paths[0] or 'the model'}, ..." if paths else "") for p, paths in facts["presets"].items()
        ]
        print_table(rows, ("targets", "modules", "such as"), f"for {method}")
        if targets:
            rows = [(m["path"], m["class"], m["kind"], m["shape"]) for m in facts["targets"]]
            print_table(rows, ("module", "class", "kind", "shape"), f"{targets}: {len(rows)} modules")


def _print_adapter(facts: dict, title: str) -> None:
    dtypes = [f"{count} {dtype}" for dtype, count in facts["dtypes"].items()]
    rows = [(key, "x".join(map(str, shape))) for key, shape in facts["tensors"].items()]
    shown = {k: v for k, v in facts.items() if k not in ("tensors", "config")} | {"dtypes": dtypes}
    print_facts(shown | {f"{k} ": v for k, v in facts["config"].get("hyperparameters", {}).items()}, title)
    print_table(rows, ("tensor", "shape"))


def _facts(name: str, targets: str | None, method: str) -> tuple[str, dict]:
    from .. import bases, inits
    from ..catalogue import describe, describe_initialisation
    from ..core.delta import METHODS
    from ..core.factored import INITS
    from ..core.folder import CHAIN, CONFIG
    from ..core.recipe import method as called
    from ..inspection import adapter_facts, model_facts
    from ..training.messages import nearest

    folder = Path(name).expanduser()
    if any((folder / file).exists() for file in (CONFIG, CHAIN)) or (
        folder.is_file() and folder.suffix == ".safetensors"
    ):
        found = adapter_facts(folder)
        return ("adapter", found[0]) if len(found) == 1 else ("adapters", {"adapters": found})
    if folder.is_dir() or bases.named(name) or "/" in name:
        return "model", model_facts(name, targets and split(targets), method)
    called("lora")  # loads the catalogue
    inits.load()
    if name in METHODS:
        return "method", describe(METHODS[name])
    if name not in INITS:
        known = [*METHODS, *INITS, *bases.names()]
        raise GraftError(f"there is no method, initialisation, base or folder {name!r}: {nearest(name, known)}")
    return "initialisation", describe_initialisation(INITS[name])
