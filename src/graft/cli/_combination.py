"""What the commands share that make a new adapter out of others."""

from typing import Annotated, Any

import typer

from ..core.errors import GraftError
from ._output import print_facts, print_json, print_table

Output = Annotated[str, typer.Option(metavar="FOLDER", help="Where to write; it must not exist.")]
Format = Annotated[str, typer.Option(help="graft, or another format that the method has, such as peft.")]


def only(base: Any, folder: str) -> str:
    """The name of the one adapter that was loaded from a folder."""
    from ..core.registry import adapters

    first, *others = adapters(base.model)
    if others:
        raise GraftError(f"{folder} holds several adapters: choose one of them, such as {folder}/{first}")
    return first


def saved(done: Any, base: Any, output: str, format: str) -> dict[str, Any]:
    """Write the adapter of a combination, and say what it is."""
    done.adapter.save(output, base_model=base.name, format=format)
    return {
        "output": output,
        "method": done.adapter.recipe.method.name,
        "parameters": sum(p.numel() for p in done.adapter.parameters()),
        "exact": done.exact,
        "error": done.error,
        "errors": done.errors,
    }


def print_made(facts: dict[str, Any], as_json: bool) -> None:
    """The new adapter: what it is, and the error by module where there is one."""
    if as_json:
        return print_json(facts)
    errors = facts.pop("errors")
    if not facts["exact"]:
        rows = [(path, f"{error:.2%}") for path, error in errors.items()]
        print_table(rows, ("module", "of its change lost"))
    print_facts(facts | {"error": f"{facts['error']:.2%}"})
