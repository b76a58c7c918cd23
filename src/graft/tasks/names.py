"""The name of a function from what it says of itself."""

from collections.abc import Hashable, Iterable
from dataclasses import dataclass

from . import Reference, Row
from .code import Code, Function
from .metrics import chrf, exact_match


@dataclass(frozen=True, kw_only=True)
class Names(Code):
    """Name a function after its docstring: functions of the Python standard library.

    The docstring as a comment in quotes and `def` in the prompt, the name in the completion. Left out are names with
    two underscores at both ends, and those that the docstring itself says.
    """

    name = "names"
    reference = Reference(base="graft:seedling-small", steps=50, max_length=256, rows=128)
    metrics = (exact_match, chrf)

    def row(self, found: Function) -> Row | None:
        special = found.name.startswith("__") and found.name.endswith("__")
        if special or found.name.lower() in found.docstring.lower():
            return None
        return {"prompt": f'"""{found.docstring}"""\ndef', "completion": f" {found.name}"}

    def items(self, row: Row) -> Iterable[Hashable]:
        """The module and the docstring; a name may come again."""
        return row["module"], row["prompt"]
