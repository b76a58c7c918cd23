"""Classify docstrings of the Python standard library into the chapters of its documentation.

The texts are the docstrings of the functions, classes and methods of the running interpreter's standard library: real
English, technical, on every machine that runs Python. The label is the chapter of "The Python Standard Library"
(https://docs.python.org/3/library/) that documents the module the object belongs to. Modules written in Python are
parsed rather than imported; modules written in C are imported, because only the interpreter knows their docstrings.

The three splits share no text and no top-level object: a class and its methods stand together in one split. What a
text repeats in other letters' case, spacing or punctuation counts as the same text; a text that stands in several
chapters is left out.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import random
import re
import sysconfig
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

# The chapters as the documentation of Python 3.14 groups the modules; a name stands for the whole package below it
# unless a longer name says otherwise. A name with a leading underscore is the implementation of a documented module.
# Left out: graphical interfaces and what else many installations lack, modules that Python 3.13 removed, tests.
CHAPTERS: dict[str, str] = {
    "Built-in functions and types": "builtins _collections_abc _sitebuiltins",
    "Text processing": "string _string re sre_parse sre_compile sre_constants _sre difflib textwrap unicodedata"
    " stringprep rlcompleter",
    "Binary data": "struct _struct codecs _codecs encodings",
    "Data types": "datetime _datetime _pydatetime _strptime zoneinfo _zoneinfo calendar collections _collections heapq"
    " _heapq bisect _bisect array weakref _weakref _weakrefset types copy pprint reprlib enum graphlib",
    "Numbers and mathematics": "numbers math cmath decimal _decimal _pydecimal fractions random _random statistics"
    " _statistics _pylong",
    "Functional programming": "itertools functools _functools operator _operator",
    "Files and directories": "pathlib posixpath ntpath genericpath stat _stat filecmp tempfile glob fnmatch linecache"
    " shutil",
    "Data persistence": "pickle _pickle _compat_pickle copyreg shelve marshal dbm _dbm _gdbm sqlite3 _sqlite3",
    "Compression and archiving": "zlib gzip bz2 _bz2 lzma _lzma zipfile tarfile compression _compression _zstd",
    "File formats": "csv _csv configparser tomllib netrc plistlib",
    "Cryptography": "hashlib _hashlib hmac _hmac _blake2 _md5 _sha1 _sha2 _sha256 _sha512 _sha3 secrets",
    "Operating system services": "os posix io _io _pyio time logging platform errno ctypes _ctypes",
    "Command-line interfaces": "argparse optparse getopt getpass fileinput curses _curses _curses_panel cmd shlex",
    "Concurrent execution": "threading _thread _threading_local multiprocessing _multiprocessing concurrent subprocess"
    " _posixsubprocess sched queue _queue contextvars _contextvars",
    "Networking and interprocess communication": "asyncio _asyncio socket _socket ssl _ssl select selectors signal"
    " _signal mmap",
    "Internet data": "email json _json mailbox mimetypes base64 binascii quopri",
    "Structured markup": "html _markupbase xml pyexpat _elementtree",
    "Internet protocols": "webbrowser wsgiref urllib http ftplib poplib imaplib smtplib uuid socketserver xmlrpc"
    " ipaddress",
    "Multimedia and internationalization": "wave colorsys gettext locale _locale",
    "Development tools": "typing _typing pydoc doctest unittest",
    "Debugging and profiling": "bdb faulthandler pdb profile cProfile _lsprof pstats timeit trace tracemalloc"
    " _tracemalloc",
    "Packaging and distribution": "ensurepip venv zipapp",
    "Runtime services": "sys sysconfig warnings _warnings dataclasses contextlib abc _abc _py_abc atexit traceback gc"
    " inspect annotationlib site code codeop",
    "Importing modules": "zipimport pkgutil modulefinder runpy importlib _imp _frozen_importlib"
    " _frozen_importlib_external",
    "Language services": "ast _ast _ast_unparse symtable _symtable token keyword tokenize tabnanny pyclbr py_compile"
    " compileall dis _opcode opcode pickletools",
    "Unix services": "pwd grp termios tty pty fcntl resource syslog",
}
CHAPTER_OF = {module: chapter for chapter, modules in CHAPTERS.items() for module in modules.split()}


class Row(TypedDict):
    """One docstring: its text, its chapter (`label`), and the object it documents (`module`, qualified `name`)."""

    text: str
    label: str
    module: str
    name: str


@dataclass(frozen=True)
class Chapters:
    """The classification task: the chapters and the rows of each split."""

    labels: tuple[str, ...]
    train: list[Row]
    validation: list[Row]
    test: list[Row]


def load(
    *, seed: int = 0, validation: float = 0.1, test: float = 0.2, min_words: int = 5, min_texts: int = 75
) -> Chapters:
    """Read the standard library of the running interpreter and split it.

    Args:
        seed: decides the split and the order of the rows; equal seeds give equal rows on one interpreter.
        validation: share of each chapter's texts held out for choosing hyperparameters.
        test: share of each chapter's texts held out for the final measurement.
        min_words: shorter texts are left out.
        min_texts: chapters with fewer texts are left out.

    Raises:
        ValueError: if a share is out of range or no chapter has `min_texts` texts.
    """
    if validation < 0 or test < 0 or validation + test >= 1:
        raise ValueError(
            f"validation={validation}, test={test}: the shares must not be negative and sum to less than 1"
        )
    chapters = {
        chapter: objects
        for chapter, objects in _objects(min_words).items()
        if sum(len(texts) for texts in objects.values()) >= min_texts
    }
    if not chapters:
        raise ValueError(f"min_texts={min_texts}: no chapter of this interpreter's library has so many texts")

    generator = random.Random(seed)
    split = Chapters(tuple(chapters), [], [], [])
    for label, objects in chapters.items():
        names = sorted(objects)
        generator.shuffle(names)
        total = sum(len(texts) for texts in objects.values())
        room = {"test": round(test * total), "validation": round(validation * total), "train": total}
        for name in names:
            part = next(part for part in room if len(objects[name]) <= room[part])
            room[part] -= len(objects[name])
            for text, module, qualified in objects[name]:
                getattr(split, part).append(Row(text=text, label=label, module=module, name=qualified))
    for part in (split.train, split.validation, split.test):
        generator.shuffle(part)
    return split


def clean(docstring: str) -> str:
    """The docstring's prose on one line: interactive examples (`>>> ...` up to an empty line) are cut out."""
    return " ".join(re.sub(r"^[ \t]*>>>.*?(?:\n[ \t]*\n|\Z)", "\n", docstring, flags=re.M | re.S).split())


def _objects(min_words: int) -> dict[str, dict[str, list[tuple[str, str, str]]]]:
    """{chapter: {top-level object: [(text, module, qualified name), ...]}}, each text once."""
    same: dict[str, list[tuple[str, str, str]]] = defaultdict(list)
    for module, name, docstring in sorted({*_python_docstrings(), *_c_docstrings()}):
        text = clean(docstring)
        words = re.findall(r"\w+", text.lower())
        if len(words) >= min_words:
            same[" ".join(words)].append((text, module, name))
    chapters: dict[str, dict[str, list[tuple[str, str, str]]]] = {chapter: {} for chapter in CHAPTERS}
    for found in same.values():
        of_text = {CHAPTER_OF[_package(module)] for _, module, _ in found}
        if len(of_text) == 1:
            # By the name alone: a class and its twin in C (`_pyio.IOBase`, `_io._IOBase`) are one object.
            top = found[0][2].partition(".")[0].lstrip("_")
            chapters[of_text.pop()].setdefault(top, []).append(found[0])
    return chapters


def _python_docstrings() -> Iterator[tuple[str, str, str]]:
    """(module, qualified name, docstring) of every function and class in the library's sources."""
    root = Path(sysconfig.get_path("stdlib"))
    for top in CHAPTER_OF:
        sources = [root / f"{top}.py", *(root / top).rglob("*.py")]
        for source in sources:
            parts = source.relative_to(root).with_suffix("").parts
            if source.is_file() and not {"test", "tests", "_bundled"} & set(parts):
                module = ".".join(parts).removesuffix(".__init__")
                yield from ((module, *found) for found in _definitions(ast.parse(source.read_bytes()), ""))


def _definitions(node: ast.AST, prefix: str) -> Iterator[tuple[str, str]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(child)
            if docstring:
                yield prefix + child.name, docstring
            yield from _definitions(child, f"{prefix}{child.name}.")
        else:
            yield from _definitions(child, prefix)


def _c_docstrings() -> Iterator[tuple[str, str, str]]:
    """(module, qualified name, docstring) of what the modules written in C define, their classes' members included."""
    for module in CHAPTER_OF:
        spec = importlib.util.find_spec(module)
        if spec is None or spec.origin == "frozen" or (spec.origin or "").endswith(".py"):
            continue
        try:
            namespace = vars(importlib.import_module(module))
        except ImportError:  # an extension whose system library is not installed
            continue
        for name, value in namespace.items():
            # What a module only borrows from another chapter's module is no part of its documentation.
            if (
                callable(value)
                and CHAPTER_OF.get(_package(getattr(value, "__module__", None) or "")) == CHAPTER_OF[module]
            ):
                members = vars(value).items() if isinstance(value, type) else ()
                for qualified, member in [(name, value), *((f"{name}.{key}", member) for key, member in members)]:
                    docstring = getattr(member, "__doc__", None)
                    if isinstance(docstring, str) and (callable(member) or inspect.isdatadescriptor(member)):
                        yield module, qualified, inspect.cleandoc(docstring)


def _package(module: str) -> str:
    return module.partition(".")[0]
