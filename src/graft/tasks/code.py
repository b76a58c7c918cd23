"""Python code after the prose that describes it."""

import ast
import re
import textwrap
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Annotated, ClassVar, NamedTuple

from ..core.hyper import Range
from . import Metric, Reference, Row, Task
from .chapters import sources
from .kept import kept

VALIDATION, TEST = 0.05, 0.1  # shares of the functions


class Function(NamedTuple):
    """A function of the library: where it stands, its name, its docstring, and its source without that."""

    module: str
    name: str
    docstring: str
    code: str


@dataclass(frozen=True, kw_only=True)
class Code(Task):
    """Write the code of a function after its docstring: functions of the Python standard library.

    The docstring as a comment in quotes in the prompt, the function without it in the completion. Functions of one
    module stand in one split, and no docstring and no code stands twice. What counts is the loss per token and its
    perplexity, which the objective reports; who knows nothing has a perplexity of the size of the vocabulary.
    """

    name = "code"
    sources = "the running interpreter's standard library, its modules in Python"
    licence = "PSF-2.0"
    reference = Reference(base="graft:seedling-small", steps=40, batch_size=8, max_length=256)
    splits = {
        "train": "functions to learn from",
        "validation": "functions of other modules",
        "test": "functions of other modules",
    }
    metrics: ClassVar[tuple[Metric, ...]] = ()
    portable = False

    longest: Annotated[int, "characters of docstring and code together; longer ones are left out", Range(100)] = 2000

    def items(self, row: Row) -> Iterable[Hashable]:
        """The module, the docstring and the code."""
        return row["module"], row["prompt"], row["completion"]

    def generate(self) -> dict[str, list[Row]]:
        modules: dict[str, list[Row]] = {}
        for found in functions():
            if len(found.docstring) + len(found.code) <= self.longest and (row := self.row(found)):
                modules.setdefault(found.module, []).append({**row, "module": found.module})
        total = sum(map(len, modules.values()))
        room = {"test": round(TEST * total), "validation": round(VALIDATION * total), "train": total}
        split: dict[str, list[Row]] = {part: [] for part in self.splits}
        order = sorted(modules)
        self.draw("modules").shuffle(order)
        for module in order:
            part = next(part for part in room if len(modules[module]) <= room[part])
            room[part] -= len(modules[module])
            split[part] += modules[module]
        for part, rows in split.items():
            self.draw(part).shuffle(rows)
        return split

    def row(self, found: Function) -> Row | None:
        """Prompt and completion of one function, if it fits the task."""
        return {"prompt": f'"""{found.docstring}"""\n', "completion": found.code}


@cache
def functions() -> list[Function]:
    """The functions and methods with a docstring and more than that, no docstring and no code twice."""
    return [Function(*parts) for parts in kept(_parsed, sources())]


def _parsed(sources: Iterable[tuple[str, bytes]]) -> list[Function]:
    """The same, of sources: parsing them takes seconds."""
    found: dict[str, Function] = {}
    for module, source in sources:
        # Lines as the parser counts them: a form feed ends none.
        lines = re.split("\r?\n", source.decode("utf-8", errors="replace"))
        for function in _functions(module, lines, ast.parse(source)):
            found.setdefault(function.docstring, function)
    return sorted({function.code: function for function in sorted(found.values(), reverse=True)}.values())


def _functions(module: str, lines: list[str], tree: ast.AST) -> Iterator[Function]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and len(node.body) > 1:
            docstring, said = ast.get_docstring(node), node.body[0]
            # Whole lines are taken, so nothing else may stand on those of the docstring.
            if docstring and said.lineno > node.lineno and (said.end_lineno or 0) < node.body[1].lineno:
                head, body = lines[node.lineno - 1 : said.lineno - 1], lines[said.end_lineno : node.end_lineno]
                rest = textwrap.dedent("\n".join([*head, "\n".join(body).strip("\n")])) + "\n"
                if _same(rest, node):
                    yield Function(module, node.name, docstring, rest)


def _same(code: str, node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether code is what `node` is without its docstring: strings over several lines may not survive the dedent."""
    try:
        (found,) = ast.parse(code).body
    except (SyntaxError, ValueError):
        return False
    return type(found) is type(node) and [ast.dump(part) for part in found.body] == [
        ast.dump(part) for part in node.body[1:]
    ]
