"""Functions of the standard library: code that parses, and names that the prompt does not say."""

import ast
import inspect
import shutil
import textwrap

from graft import tasks
from graft.tasks import code
from graft.tasks.code import functions


def test_code_is_the_function_without_its_docstring():
    for function in functions():
        (node,) = ast.parse(function.code).body
        assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == function.name
    found = {f.name: f for f in functions() if f.module == "shutil"}
    for name in ("copyfileobj", "copytree", "which"):
        whole = ast.parse(textwrap.dedent(inspect.getsource(getattr(shutil, name)))).body[0]
        assert isinstance(whole, ast.FunctionDef)
        del whole.body[0]
        assert ast.unparse(ast.parse(found[name].code)) == ast.unparse(whole)
        assert found[name].docstring == inspect.getdoc(getattr(shutil, name))


def test_rows_are_prose_and_then_code_no_longer_than_asked():
    rows = [row for split in ("train", "validation", "test") for row in tasks.load("code", split=split, longest=500)]
    assert len(rows) > 1000
    for row in rows:
        assert row["prompt"].startswith('"""') and row["prompt"].endswith('"""\n')
        assert len(row["prompt"]) - 7 + len(row["completion"]) <= 500
        ast.parse(row["completion"])


def test_names_are_not_said_in_the_prompt():
    rows = [row for split in ("train", "validation", "test") for row in tasks.load("names", split=split)]
    assert len(rows) > 1000
    for row in rows:
        name = row["completion"].strip()
        assert name.isidentifier() and name.lower() not in row["prompt"].removesuffix("def").lower()
        assert row["prompt"].endswith('"""\ndef') and not (name.startswith("__") and name.endswith("__"))


def test_code_that_would_change_is_left_out(monkeypatch):
    source = b'''
class A:
    \x0c
    def kept(self):
        """Say one."""

        return 1
    def strung(self):
        """Say two."""
        return """
    two"""
    def short(self):
        """Say nothing."""
'''
    monkeypatch.setattr(code, "sources", lambda: [("here", source)])
    code.functions.cache_clear()
    try:
        assert functions() == [("here", "kept", "Say one.", "def kept(self):\n    return 1\n")]
    finally:
        code.functions.cache_clear()
