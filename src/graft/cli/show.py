"""graft show: one method, adapter or model in full."""

from pathlib import Path
from typing import Annotated

import typer

from ..core.errors import GraftError
from ._output import Json, print_facts, print_json, print_table, working
from ._settings import split


def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A method, an adapter (folder or file), or a model.")],
    targets: Annotated[str | None, typer.Option(help="Of a model: the modules that these targets pick.")] = None,
    method: Annotated[str, typer.Option(help="Of a model: for which method.")] = "lora",
    as_json: Json = False,
) -> None:
    """Show all about a method, what an adapter holds, or the modules of a model that targets pick."""
    with working():
        kind, facts = _facts(name, targets, method)
    if as_json:
        return print_json({"kind": kind, **facts})
    if kind == "method":
        rows = ("class", "family", "hosts", "targets", "mergeable", "needs", "starts_as_base")
        print_facts({row.replace("_", " "): facts[row] for row in rows}, name)
        print(f"{facts['doc']}\n")
        for paper in facts["papers"]:
            print(f"{paper['authors']}, {paper['year']}: {paper['title']}. {paper['url']}")
        values = [[*h["type"], *map(repr, h["choices"])] for h in facts["hyperparameters"]]
        rows = [
            (h["name"], "required" if h["required"] else str(h["default"]), " or ".join(v), h["range"], h["meaning"])
            for h, v in zip(facts["hyperparameters"], values)
        ]
        print_table(rows, ("hyperparameter", "default", "type", "range", "meaning"))
    elif kind == "adapter":
        facts["dtypes"] = [f"{count} {dtype}" for dtype, count in facts["dtypes"].items()]
        rows = [(key, "x".join(map(str, shape))) for key, shape in facts.pop("tensors").items()]
        config = facts.pop("config")
        print_facts(facts | {f"{k} ": v for k, v in config.get("hyperparameters", {}).items()}, name)
        print_table(rows, ("tensor", "shape"))
    else:
        print_facts({k: facts[k] for k in ("class", "parameters")}, name)
        rows = [
            (p, len(paths), f"{paths[0] or 'the model'}, ..." if paths else "") for p, paths in facts["presets"].items()
        ]
        print_table(rows, ("targets", "modules", "such as"), f"for {method}")
        if targets:
            rows = [(m["path"], m["class"], m["kind"], m["shape"]) for m in facts["targets"]]
            print_table(rows, ("module", "class", "kind", "shape"), f"{targets}: {len(rows)} modules")


def _facts(name: str, targets: str | None, method: str) -> tuple[str, dict]:
    from ..catalogue import describe
    from ..core.delta import METHODS
    from ..core.recipe import method as called
    from ..inspection import adapter_facts, model_facts
    from ..models import ships
    from ..training.messages import nearest

    folder = Path(name).expanduser()
    if (folder / "adapter_config.json").exists() or (folder.is_file() and folder.suffix == ".safetensors"):
        return "adapter", adapter_facts(folder)
    if folder.is_dir() or name in ships() or "/" in name:
        return "model", model_facts(name, targets and split(targets), method)
    called("lora")  # loads the catalogue
    if name not in METHODS:
        raise GraftError(f"there is no method, base or folder {name!r}: {nearest(name, [*METHODS, *ships()])}")
    return "method", describe(METHODS[name])
