"""The catalogue: what methods, initialisations and scores say of themselves, as plain data; none is listed by hand."""

import inspect
import math
import pkgutil
from collections.abc import Mapping
from typing import Any

from . import inits, methods
from .core.delta import METHODS, Delta
from .core.errors import GraftError
from .core.factored import INITS, Init, Initialised
from .core.hyper import Hyper, hyperparameters
from .core.selection import SCORES


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
    return {
        **_named(cls),
        "family": family(cls),
        "hosts": list(cls.hosts),
        "targets": plain(cls.targets),
        "mergeable": cls.mergeable(),
        "needs": list(cls.needs),
        "starts_as_base": cls.starts_as_base,
        "hyperparameters": [described(h) for h in hyperparameters(cls).values()],
    }


def initialisations() -> list[dict[str, Any]]:
    """All initialisations of low-rank factors, by name; each as `describe_initialisation` gives it."""
    inits.load()
    return [describe_initialisation(cls) for _, cls in sorted(INITS.items())]


def describe_initialisation(cls: type[Init]) -> dict[str, Any]:
    """An initialisation as plain data, with the methods whose factors it can start."""
    methods.load()
    asked = cls().asks({"rank": 8})
    return {
        **_named(cls),
        "hosts": list(cls.hosts),
        "needs": [need.partition(":")[0] for need in asked],
        "taken_off": cls.taken_off,
        "starts_as_base": cls.starts_as_base,
        "hyperparameters": [described(h) for h in hyperparameters(cls).values()],
        "methods": [
            name
            for name, method in sorted(METHODS.items())
            if issubclass(method, Initialised)
            and "init" in hyperparameters(method)
            and set(method.hosts) & set(cls.hosts)
        ],
    }


def scores() -> list[dict[str, Any]]:
    """What chooses the entries of matrices to train: its formula, and {method: hyperparameter that names it}."""
    methods.load()
    named = [
        (name, h.name, set(h.kinds) & set(SCORES))
        for name, cls in METHODS.items()
        for h in hyperparameters(cls).values()
    ]
    return [
        {
            "name": name,
            "formula": score.formula,
            "needs": list(score.needs),
            "methods": {method: key for method, key, choices in sorted(named) if name in choices and len(choices) > 1},
        }
        for name, score in SCORES.items()
    ]


def _named(cls: type[Delta] | type[Init]) -> dict[str, Any]:
    """What a method and an initialisation both say."""
    doc = inspect.cleandoc(cls.__doc__ or "")
    return {
        "name": cls.name,
        "class": cls.__name__,
        "summary": " ".join(doc.split("\n\n")[0].split()),
        "doc": doc,
        "known": cls.known,
        "papers": [paper._asdict() for paper in cls.papers],
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
