"""A recipe: a method with its hyperparameters, before it meets a model."""

import difflib
import inspect
from dataclasses import dataclass, field
from typing import Any

from .delta import METHODS, Delta
from .errors import GraftError
from .hyper import check, hyperparameters
from .targets import matcher

_NONE = inspect.Parameter.empty  # the default of a required hyperparameter


def method(name: str) -> type[Delta]:
    """The method called `name`."""
    from .. import methods

    methods.load()
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(sorted(METHODS))}"
        raise GraftError(f"no method is called {name!r}; {hint}")
    return METHODS[name]


def matches(pattern: str, path: str) -> bool:
    """Whether an entry of a table of hyperparameters counts at `path`; "*" fits every path."""
    return pattern == "*" or matcher(pattern)(path) is not None


class ByPath(dict):
    """The values of a hyperparameter by the very path of a module: what a saved adapter holds."""

    def __repr__(self):
        return f"<{' or '.join(sorted({repr(value) for value in self.values()}))} by module>"


@dataclass
class Recipe:
    """What `graft.LoRA(rank=8)` gives: method and complete hyperparameters, checked.

    A value may depend on the site: a function of the site, or a table {regular expression over paths: value} whose
    first fitting entry counts ("*" fits all; without it the default of the method takes the rest).
    """

    method: type[Delta]
    hyper: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        known = hyperparameters(self.method)
        for name, value in self.hyper.items():
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f" (did you mean {near[0]}?)" if near else ""
                raise GraftError(f"{self.method.name} has no hyperparameter {name!r}{hint}; it has {', '.join(known)}")
            for one in value.values() if isinstance(value, dict) else [value]:
                if not callable(one):
                    check(self.method, name, one)
        missing = [n for n, h in known.items() if h.required and n not in self.hyper]
        if missing:
            raise GraftError(f"{self.method.name} needs {', '.join(missing)}")
        # Complete, because defaults may change in later versions.
        self.hyper = {n: h.default for n, h in known.items()} | self.hyper

    @classmethod
    def of(cls, what: Any, **hyper) -> "Recipe":
        """From a recipe, a method's class or its name."""
        if isinstance(what, Recipe):
            return cls(what.method, what.hyper | hyper)
        if isinstance(what, str):
            what = method(what)
        if isinstance(what, type) and issubclass(what, Delta):
            return cls(what, hyper)
        raise GraftError(f"a method is a name, a class or graft.LoRA(rank=8) and the like, not {what!r}")

    def at(self, site) -> dict[str, Any]:
        """The hyperparameters at one site."""
        values = {}
        for name, value in self.hyper.items():
            if isinstance(value, dict):
                default = hyperparameters(self.method)[name].default
            if isinstance(value, ByPath):
                value = value.get(site.path, default)
            elif isinstance(value, dict):
                value = next((v for pattern, v in value.items() if matches(pattern, site.path)), default)
            if value is _NONE:
                raise GraftError(
                    f"{self.method.name}: the table of {name} has no entry for {site.path}, and {name} no default: "
                    f'add one, "*" fits every path'
                )
            if callable(value):
                value = value(site)
            if value is not self.hyper[name]:
                check(self.method, name, value)
            values[name] = value
        return values

    def __repr__(self):
        return f"{self.method.name}({', '.join(f'{k}={v!r}' for k, v in self.hyper.items())})"
