"""The catalogue: what the methods say of themselves, as plain data. Nothing in it is listed by hand."""

import inspect
import math
import pkgutil
from collections.abc import Mapping
from typing import Any

from . import methods
from .core.delta import METHODS, Delta
from .core.errors import GraftError
from .core.hyper import Hyper, hyperparameters


def families() -> list[str]:
    """The families of methods: the folders of `graft/methods`, and "other" for methods of other packages."""
    return [m.name for m in pkgutil.iter_modules(methods.__path__) if m.ispkg] + ["other"]


def family(cls: type[Delta]) -> str:
    """The family of a method: the folder its file lies in."""
    inside, _, rest = cls.__module__.partition(f"{methods.__name__}.")
    return rest.split(".")[0] if rest and not inside else "other"


def catalogue(of: str | None = None) -> list[dict[str, Any]]:
    """All methods, or those of one family, by name; each as `describe` gives it."""
    if of is not None and of not in families():
        raise GraftError(f"there is no family {of!r} of methods; there are {', '.join(families())}")
    methods.load()
    return [describe(cls) for _, cls in sorted(METHODS.items()) if of in (None, family(cls))]


def describe(cls: type[Delta]) -> dict[str, Any]:
    """A method as plain data, ready for JSON."""
    doc = inspect.cleandoc(cls.__doc__ or "")
    return {
        "name": cls.name,
        "class": cls.__name__,
        "family": family(cls),
        "summary": " ".join(doc.split("\n\n")[0].split()),
        "doc": doc,
        "hosts": list(cls.hosts),
        "targets": plain(cls.targets),
        "mergeable": cls.mergeable(),
        "needs": list(cls.needs),
        "starts_as_base": cls.starts_as_base,
        "papers": [paper._asdict() for paper in cls.papers],
        "hyperparameters": [described(h) for h in hyperparameters(cls).values()],
    }


def described(hyper: Hyper) -> dict[str, Any]:
    """A hyperparameter, or another keyword written like one, as plain data."""
    choices = [k for k in hyper.kinds if not isinstance(k, type)]
    return {
        "name": hyper.name,
        "required": hyper.required,
        "default": None if hyper.required else plain(hyper.default),
        "type": [k.__name__ for k in hyper.kinds if isinstance(k, type)],
        "choices": [plain(c) for c in choices],
        "range": ", ".join(map(str, hyper.ranges)),
        "meaning": hyper.doc,
    }


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: tuples as lists, functions by name, numbers that are not finite as text."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(v) for v in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    return getattr(value, "__name__", None) or str(value)
