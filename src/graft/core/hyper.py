"""Hyperparameters: the keyword-only arguments of a method, their documentation and their allowed values.

    rank: Annotated[int, "rank of the update", Range(1)] = 8

is all a method writes. The command line, the saved configuration, the catalogue and the checks are derived from it.
"""

import functools
import inspect
import math
import types
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from .errors import GraftError


@dataclass(frozen=True)
class Range:
    """Allowed numbers: low <= value <= high; `above` and `below` are strict bounds."""

    low: float = -math.inf
    high: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def __contains__(self, value) -> bool:
        return self.low <= value <= self.high and self.above < value < self.below

    def __str__(self):
        bounds = [("at least", self.low), ("above", self.above), ("at most", self.high), ("below", self.below)]
        return " and ".join(f"{word} {bound:g}" for word, bound in bounds if math.isfinite(bound))


@dataclass(frozen=True)
class Rule:
    """Allowed values, where a range cannot say it: `reason` tells why a value is refused, or None."""

    reason: Callable[[Any], str | None]


@dataclass(frozen=True)
class Hyper:
    """One hyperparameter: its name, default, accepted types, allowed values and meaning."""

    name: str
    default: Any
    kinds: tuple = ()  # types; a Literal's values; None
    ranges: tuple[Range, ...] = ()
    rules: tuple[Rule, ...] = ()
    doc: str = ""
    annotation: Any = field(default=None, compare=False)

    @property
    def required(self) -> bool:
        return self.default is inspect.Parameter.empty

    def allowed(self) -> str:
        words = [" or ".join(_word(kind) for kind in self.kinds)] if self.kinds else []
        return ", ".join(words + [str(r) for r in self.ranges])

    def accepts(self, value) -> bool:
        if not self.kinds:
            return True
        return any(_fits(kind, value) for kind in self.kinds) and (
            not isinstance(value, int | float) or all(value in r for r in self.ranges)
        )


def _word(kind) -> str:
    return kind.__name__ if isinstance(kind, type) else repr(kind)


def _fits(kind, value) -> bool:
    if not isinstance(kind, type):
        return kind == value and type(kind) is type(value)
    if kind in (int, float) and isinstance(value, bool):
        return False
    if kind is float:
        return isinstance(value, int | float) and math.isfinite(value)
    if kind is tuple:
        return isinstance(value, Iterable) and not isinstance(value, str)
    return isinstance(value, kind)


def _kinds(annotation) -> tuple:
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return tuple(kind for part in typing.get_args(annotation) for kind in _kinds(part))
    if origin is Literal:
        return typing.get_args(annotation)
    if annotation is type(None):
        return (None,)
    if annotation in (inspect.Parameter.empty, Any):
        return ()
    return (origin or annotation,)


@functools.cache
def keywords(function: Callable) -> dict[str, Hyper]:
    """The keyword-only arguments of a function, in the order of its signature."""
    hints = typing.get_type_hints(function, include_extras=True)
    found = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is not parameter.KEYWORD_ONLY:
            continue
        annotation, extras = hints.get(name, Any), ()
        if typing.get_origin(annotation) is typing.Annotated:
            annotation, *extras = typing.get_args(annotation)
        found[name] = Hyper(
            name,
            parameter.default,
            _kinds(annotation),
            tuple(e for e in extras if isinstance(e, Range)),
            tuple(e for e in extras if isinstance(e, Rule)),
            " ".join(e for e in extras if isinstance(e, str)),
            annotation,
        )
    return found


def hyperparameters(cls: type) -> dict[str, Hyper]:
    """The hyperparameters of a method, in the order of its signature."""
    return keywords(cls.__init__)


def check(cls: type, name: str, value) -> None:
    """Refuse a value that hyperparameter `name` of method `cls` does not allow."""
    hyper = hyperparameters(cls)[name]
    if not hyper.accepts(value):
        raise GraftError(f"{cls.name}: {name} must be {hyper.allowed()}, not {value!r}")
    if reason := next((r for rule in hyper.rules if (r := rule.reason(value))), None):
        raise GraftError(f"{cls.name}: {name}={value!r} is refused: {reason}")
