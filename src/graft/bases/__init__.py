"""Base models by name: small ones that ship, and those that other packages announce. One folder a base.

    from graft import bases
    bases.names()  # ["minilm", ...]
    base = bases.load("minilm")  # a `graft.Base`, as from graft.load_base("graft:minilm")

Wherever a model is named, `graft:minilm` is such a base, and so is the bare name where no folder is called so.

A base is a package here, which is called like it with "_" for "-": card.json says what it is (see `graft.bases.card`),
checkpoint/ is a plain folder of transformers, and `__init__.py` describes it and defines the models that transformers
does not have; one such as ...ForSequenceClassification is taken for that objective. `bases/publish.py` in the
repository writes the first two. Another distribution announces such a package under the entry point "graft.bases",
as NAME = "package"; where two have a name, Graft's own base has it.
"""

import ast
import functools
import hashlib
import importlib
import importlib.util
import json
import pkgutil
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from ..core.errors import GraftError
from ..core.names import SHIPPED
from .card import check


@dataclass(frozen=True)
class Shipped:
    """A base that ships.

    name          without the prefix
    module        the package that holds it
    distribution  the one which that package is from
    """

    name: str
    module: str
    distribution: str

    @property
    def id(self) -> str:
        """What a model is called wherever one is named: graft:NAME."""
        return f"{SHIPPED}{self.name}"

    @functools.cached_property
    def place(self) -> Path:
        """The folder of its package."""
        try:
            spec = importlib.util.find_spec(self.module)
        except ImportError:
            spec = None
        if spec is None or spec.origin is None:
            raise GraftError(f"the base {self.name} is announced by {self.distribution}, which has no {self.module}")
        return Path(spec.origin).parent

    @functools.cached_property
    def card(self) -> dict[str, Any]:
        """The facts in card.json, see `graft.bases.card.check`."""
        file = self.place / "card.json"
        if not file.is_file():
            raise GraftError(f"the base {self.name} has no {file}: {self._anew}")
        try:
            card = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise GraftError(f"{file} is damaged: {error}: {self._anew}") from None
        check(card)
        if card["name"] != self.name:
            raise GraftError(f"{file} is of the base {card['name']!r}, not of {self.name!r}")
        return card

    @property
    def summary(self) -> str:
        """What it is, in one sentence."""
        return self.card["summary"]

    @property
    def doc(self) -> str:
        """The description in its package, read without importing that."""
        return ast.get_docstring(ast.parse((self.place / "__init__.py").read_text(encoding="utf-8"))) or ""

    def missing(self) -> str | None:
        """What is not installed and how to get it, or None; the files are not read."""
        if package := self.card.get("package"):
            wanted = f"{package['distribution']} {package['version']}"
            install = f"`pip install '{package['install']}'`"
            try:
                version = metadata.version(package["distribution"])
            except metadata.PackageNotFoundError:
                return f"the base {self.name} lies in the package {wanted}, which is not installed: {install} brings it"
            if version != package["version"]:
                return (
                    f"the base {self.name} lies in the package {wanted}, and {version} is installed, which has other "
                    f"files: {install} brings the right one"
                )
        gone = [file for file in self.card["files"] if not (self._folder / file).is_file()]
        return f"{self._folder / gone[0]} of the base {self.name} is missing: {self._anew}" if gone else None

    def path(self) -> Path:
        """The folder of its checkpoint.

        GraftError if a file is missing, or is not the one whose SHA-256 the card names. A file is read for that when it
        is asked for the first time, and again only if its size or time has changed.
        """
        if said := self.missing():
            raise GraftError(said)
        for name, expected in self.card["files"].items():
            file = self._folder / name
            status = file.stat()
            found = _sha256(file, status.st_size, status.st_mtime_ns)
            if found != expected:
                raise GraftError(
                    f"{file} is damaged: its SHA-256 is {found}, and the card of the base {self.name} says {expected}: "
                    f"{self._anew}"
                )
        return self._folder

    def models(self) -> dict[str, Any]:
        """The models that its package defines, by the names of their classes."""
        from transformers import PreTrainedModel

        module = importlib.import_module(self.module)
        classes = {k: v for k, v in vars(module).items() if isinstance(v, type) and issubclass(v, PreTrainedModel)}
        return {k: v for k, v in classes.items() if v.__module__ == module.__name__}

    @property
    def _folder(self) -> Path:
        if package := self.card.get("package"):
            return Path(str(metadata.distribution(package["distribution"]).locate_file(package["folder"])))
        return self.place / "checkpoint"

    @property
    def _anew(self) -> str:
        package = vars(self).get("card", {}).get("package")  # the card itself may be damaged
        name = f"{package['distribution']}=={package['version']}" if package else self.distribution
        return f"install {name} anew, with pip's --force-reinstall"


def names() -> list[str]:
    """The names of all bases."""
    return sorted(_known())


def find(name: str) -> Shipped:
    """The base called `name`, with or without the prefix; GraftError with the names most like it if there is none."""
    known, bare = _known(), name.removeprefix(SHIPPED)
    if bare not in known:
        from ..training.messages import nearest  # imports torch

        raise GraftError(f"no base is called {bare!r}: {nearest(bare, known)}")
    return known[bare]


def named(model: str) -> Shipped | None:
    """The base that a model's name stands for, or None if it stands for something else; GraftError as `find`."""
    bare = not model.startswith(SHIPPED)
    return None if bare and (Path(model).expanduser().is_dir() or model not in _known()) else find(model)


def defining(model: str) -> Shipped | None:
    """The base whose package defines the class of models called `model`."""
    return next((base for base in _known().values() if model in base.models()), None)


def catalogue() -> list[dict[str, Any]]:
    """What all bases say of themselves, by name."""
    return [describe(base) for _, base in sorted(_known().items())]


def describe(base: Shipped) -> dict[str, Any]:
    """A base as plain data: its card, its description, and what is missing to load it."""
    return {"id": base.id, **base.card, "doc": base.doc, "missing": base.missing()}


def load(name: str, **options: Any) -> Any:
    """The base called `name` as `graft.load_base` gives it, whose options these are."""
    from ..models import load_base

    return load_base(find(name).id, **options)


def _known() -> dict[str, Shipped]:
    own = [m.name for m in pkgutil.iter_modules(__path__) if m.ispkg]
    announced = metadata.entry_points(group="graft.bases")
    others = {e.name: Shipped(e.name, e.module, e.dist.name if e.dist else e.module) for e in announced}
    return others | {
        name: Shipped(name, f"{__name__}.{folder}", "graft") for folder in own if (name := folder.replace("_", "-"))
    }


@functools.cache
def _sha256(file: Path, size: int, mtime_ns: int) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
