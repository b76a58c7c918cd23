"""The chapters of the library reference.

The texts are the docstrings of the functions, classes and methods of the running interpreter's standard library: real
English, technical, on every machine that runs Python. The label is the chapter of "The Python Standard Library"
(https://docs.python.org/3/library/) that documents the module the object belongs to. Modules written in Python are
parsed rather than imported; modules written in C are imported, because only the interpreter knows their docstrings.

The three splits share no text and no top-level object: a class and its methods stand together in one split. What a
text repeats in other letters' case, spacing or punctuation counts as the same text; a text that stands in several
chapters is left out.
"""

import ast
import importlib
import importlib.util
import inspect
import random
import re
import sysconfig
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import Annotated, Literal

from ..core.errors import GraftError
from ..core.hyper import Range
from . import Reference, Row, Task
from .kept import kept
from .metrics import accuracy
from .steps import in_steps

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


@dataclass(frozen=True, kw_only=True)
class Chapters(Task):
    """Classify docstrings of the Python standard library into the chapters of its documentation.

    A row has `text`; `label`, the chapter; and the object it documents: `module`, qualified `name`. With `steps` the
    chapters come in as many steps of different ones, for continual learning; the rows are those of one `step`. With
    `domain` they are those of one kind of objects, under the same labels.
    """

    name = "chapters"
    sources = "docstrings of the running interpreter's standard library"
    licence = "PSF-2.0"
    reference = Reference(base="graft:minilm", steps=60, max_length=64, rows=256, precision="bf16")
    splits = {
        "train": "texts to learn from",
        "validation": "texts to choose settings with",
        "test": "texts to measure with",
        "seen": "the test texts of this step and of all before it",
    }
    metrics = (accuracy,)
    target = "label"
    portable = False

    validation: Annotated[float, "share of each chapter's texts in the validation split", Range(0, below=1)] = 0.1
    test: Annotated[float, "share of each chapter's texts in the test split", Range(0, below=1)] = 0.2
    min_words: Annotated[int, "shorter texts are left out", Range(0)] = 5
    min_texts: Annotated[int, "chapters with fewer texts are left out", Range(1)] = 75
    steps: Annotated[int, "how many steps the chapters are divided into", Range(1)] = 1
    step: Annotated[int, "which of the steps, from 1", Range(1)] = 1
    domain: Annotated[Literal["all", "functions", "members"], "top-level objects, or members of classes"] = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.validation + self.test >= 1:
            raise GraftError(f"validation={self.validation}, test={self.test}: the two shares must sum to less than 1")

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(self._chapters)

    def items(self, row: Row) -> Iterable[Hashable]:
        """The words, and the top-level object."""
        return " ".join(_words(row["text"])), (row["label"], _top(row["name"]))

    def generate(self) -> dict[str, list[Row]]:
        generator = random.Random(self.seed)
        found: dict[str, list[Row]] = {"train": [], "validation": [], "test": []}
        for label, objects in self._chapters.items():
            names = sorted(objects)
            generator.shuffle(names)
            total = sum(len(texts) for texts in objects.values())
            room = {"test": round(self.test * total), "validation": round(self.validation * total), "train": total}
            for name in names:
                part = next(part for part in room if len(objects[name]) <= room[part])
                room[part] -= len(objects[name])
                found[part] += [
                    {"text": text, "label": label, "module": module, "name": qualified}
                    for text, module, qualified in objects[name]
                ]
        for rows in found.values():
            generator.shuffle(rows)
        if self.domain != "all":
            members = self.domain == "members"
            found = {part: [row for row in rows if ("." in row["name"]) == members] for part, rows in found.items()}
        return in_steps(self, found, self.steps, self.step)

    @cached_property
    def _chapters(self) -> dict[str, dict[str, list[tuple[str, str, str]]]]:
        chapters = {
            chapter: objects
            for chapter, objects in _objects(self.min_words).items()
            if sum(len(texts) for texts in objects.values()) >= self.min_texts
        }
        if not chapters:
            raise GraftError(f"min_texts={self.min_texts}: no chapter of this interpreter's library has so many texts")
        return chapters


def clean(docstring: str) -> str:
    """The docstring's prose on one line: interactive examples (`>>> ...` up to an empty line) are cut out."""
    return " ".join(re.sub(r"^[ \t]*>>>.*?(?:\n[ \t]*\n|\Z)", "\n", docstring, flags=re.M | re.S).split())


@lru_cache(maxsize=2)
def _objects(min_words: int) -> dict[str, dict[str, list[tuple[str, str, str]]]]:
    """{chapter: {top-level object: [(text, module, qualified name), ...]}}, each text once."""
    same: dict[str, list[tuple[str, str, str]]] = defaultdict(list)
    for module, name, docstring in _docstrings():
        text = clean(docstring)
        words = _words(text)
        if len(words) >= min_words:
            same[" ".join(words)].append((text, module, name))
    chapters: dict[str, dict[str, list[tuple[str, str, str]]]] = {chapter: {} for chapter in CHAPTERS}
    for found in same.values():
        of_text = {CHAPTER_OF[_package(module)] for _, module, _ in found}
        if len(of_text) == 1:
            chapters[of_text.pop()].setdefault(_top(found[0][2]), []).append(found[0])
    return chapters


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _top(name: str) -> str:
    """The top-level object, by the name alone: a class and its twin in C (`_pyio.IOBase`, `_io._IOBase`) are one."""
    return name.partition(".")[0].lstrip("_")


@cache
def _docstrings() -> list[tuple[str, str, str]]:
    """All (module, qualified name, docstring), once a process."""
    parsed = kept(_python_docstrings, sources())
    return sorted({*((module, name, said) for module, name, said in parsed), *_c_docstrings()})


def sources() -> Iterator[tuple[str, bytes]]:
    """(module, source) of the library's modules that are written in Python."""
    root = Path(sysconfig.get_path("stdlib"))
    for top in CHAPTER_OF:
        for file in [root / f"{top}.py", *(root / top).rglob("*.py")]:
            parts = file.relative_to(root).with_suffix("").parts
            if file.is_file() and not {"test", "tests", "_bundled"} & set(parts):
                yield ".".join(parts).removesuffix(".__init__"), file.read_bytes()


def _python_docstrings(sources: Iterable[tuple[str, bytes]]) -> list[tuple[str, str, str]]:
    """(module, qualified name, docstring) of every function and class in the sources: parsing them takes seconds."""
    return [(module, *found) for module, source in sources for found in _definitions(ast.parse(source), "")]


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
