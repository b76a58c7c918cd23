"""What is searched: alternatives of methods with domains for their hyperparameters, and domains for training.

    Space.of(["lora(rank=4|8|16) on attention|mlp", "ia3"], {"learning_rate": "1e-4:1e-2"})

An alternative is a method, or a chain of them joined by +, innermost first. A value of its options may be

    4|8|16          one of these
    4:64            from 4 to 64; where the upper end is ten times the lower one or more, evenly in its logarithm
    ... per block   of its own for every block of the model; `per 4 blocks`: for every four of them

`on attention|mlp` says where the method may go; without it, where it is made for. `in any blocks` after all of it
gives every block a switch, and `in any 4 blocks` every four of them. A value 0 which the method does not allow, as
rank=0, leaves the method out there.
"""

import functools
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..catalogue import plain
from ..core.errors import GraftError
from ..core.hyper import check, hyperparameters
from ..core.recipe import Recipe, method
from ..core.targets import resolve
from ..runs.configuration import Configuration

Point = dict[str, Any]  # {name of a dimension: value}, with those dimensions that its method has


@dataclass(frozen=True)
class Choice:
    """One of some values; numbers are in order."""

    values: tuple[Any, ...]

    @property
    def ordered(self) -> bool:
        return all(isinstance(v, int | float) and not isinstance(v, bool) for v in self.values)

    def at(self, share: float) -> Any:
        """The value at a share of the way."""
        return self.values[min(int(share * len(self.values)), len(self.values) - 1)]

    def share(self, value: Any) -> float:
        """Where a value is, from 0 to 1: in the middle of what `at` gives it for."""
        return (self.values.index(value) + 0.5) / len(self.values)


@dataclass(frozen=True)
class Interval:
    """Numbers from low to high; `whole`: integers."""

    low: float
    high: float
    whole: bool = False
    values = None
    ordered = True

    @property
    def log(self) -> bool:
        return self.low > 0 and self.high >= 10 * self.low

    @property
    def _ends(self) -> tuple[float, float]:
        low, high = (self.low - 0.5, self.high + 0.5) if self.whole else (self.low, self.high)
        return (math.log(low), math.log(high)) if self.log else (low, high)

    def at(self, share: float) -> float:
        low, high = self._ends
        value = low + share * (high - low)
        value = math.exp(value) if self.log else value
        if self.whole:
            return min(max(round(value), int(self.low)), int(self.high))
        return min(max(float(f"{value:.6g}"), self.low), self.high)

    def share(self, value: float) -> float:
        low, high = self._ends
        return ((math.log(value) if self.log else value) - low) / (high - low)


Domain = Choice | Interval


@dataclass(frozen=True)
class Dimension:
    """A domain, and the label of the alternative that it belongs to; None: to all."""

    domain: Domain
    owner: str | None = None


@dataclass(frozen=True)
class Spread:
    """Domains of which there is one for each `every` blocks."""

    domain: Domain
    every: int


@dataclass(frozen=True)
class Member:
    """One method of an alternative: domains of its options, and where it may go."""

    name: str
    options: Mapping[str, Domain | Spread]
    targets: Choice


@dataclass(frozen=True)
class Alternative:
    """A chain of methods, and for how many blocks there is one switch, if any."""

    label: str
    members: tuple[Member, ...]
    switches: int | None = None

    def called(self, member: Member) -> str:
        """What the names of the dimensions of a method begin with."""
        return self.label if len(self.members) == 1 else f"{self.label}.{member.name}"


class Space:
    """See above. `dimensions` has all of them by name: "method", "lora.rank", "lora.rank.0" for the first block or
    blocks, "lora.targets", "lora.block.0" for a switch, and those of training under their own names. A second
    alternative of the same methods is called "lora#2"; in a chain, its name stands before that of the method.
    """

    def __init__(self, alternatives: Sequence[Alternative], training: Mapping[str, Domain], blocks: Sequence[str] = ()):
        if not alternatives:
            raise GraftError("the space is empty: name methods, such as 'lora(rank=4|8|16)'")
        labels = [a.label for a in alternatives]
        counts = [labels[:i].count(label) + 1 for i, label in enumerate(labels)]
        alternatives = [replace(a, label=f"{a.label}#{n}") if n > 1 else a for a, n in zip(alternatives, counts)]
        self.alternatives, self.blocks = {a.label: a for a in alternatives}, list(blocks)
        self.dimensions = {"method": Dimension(Choice(tuple(self.alternatives)))}
        for a in alternatives:
            for name, domain in self._own(a):
                self.dimensions[name] = Dimension(domain, a.label)
        self.training = dict(training)
        self.dimensions |= {name: Dimension(domain) for name, domain in training.items()}

    @classmethod
    def of(cls, texts: Sequence[str], training: Mapping[str, Any], model: Any = None) -> "Space":
        """From texts as above; `model` is looked at where values are by block."""
        texts = [texts] if isinstance(texts, str) else texts
        found = [_alternative(text) for text in texts]
        for i, a in enumerate(found):
            if a in found[:i]:
                raise GraftError(f"the space names {texts[i]!r} twice")
        by_block = any(a.switches or any(isinstance(d, Spread) for m in a.members for d in m.options.values())
                       for a in found)  # fmt: skip
        blocks = [path for path, _ in resolve(model, "blocks", ("module",))] if by_block else []
        return cls(found, {name: domain_of(text, f"{name}={text}") for name, text in training.items()}, blocks)

    def _own(self, a: Alternative) -> Iterator[tuple[str, Domain]]:
        for m in a.members:
            for option, domain in m.options.items():
                if isinstance(domain, Spread):
                    for i in range(self._parts(domain.every)):
                        yield f"{a.called(m)}.{option}.{i}", domain.domain
                else:
                    yield f"{a.called(m)}.{option}", domain
            yield f"{a.called(m)}.targets", m.targets
        for i in range(self._parts(a.switches) if a.switches else 0):
            yield f"{a.label}.block.{i}", Choice((0, 1))

    def _parts(self, every: int) -> int:
        return -(-len(self.blocks) // every)

    # Points.

    def draw(self, suggest: Callable[[str, Domain], Any]) -> Point:
        """A point whose values a function gives, which is asked for the dimensions that the point has."""
        point: Point = {}
        for name, d in self.dimensions.items():
            if d.owner in (None, point.get("method")):
                point[name] = d.domain.values[0] if fixed(d.domain) else suggest(name, d.domain)  # type: ignore
        return point

    def random(self, rng: np.random.Generator) -> Point:
        """A point, each of its values drawn evenly."""
        return self.draw(lambda name, domain: domain.at(rng.random()))

    def near(self, point: Point, rng: np.random.Generator, radius: float) -> Point:
        """A point beside another: shares move by a normal number of that deviation, other values change as often."""

        def value(name: str, domain: Domain) -> Any:
            if name not in point or (not domain.ordered and rng.random() < radius):
                return domain.at(rng.random())
            if not domain.ordered:
                return point[name]
            moved = domain.share(point[name]) + rng.normal(0.0, radius)
            return domain.at(1 - abs(1 - abs(moved) % 2))  # reflected at the ends

        return self.draw(value)

    @property
    def size(self) -> float:
        """How many points there are."""
        total = 0.0
        for label in self.alternatives:
            own = [d.domain for d in self.dimensions.values() if d.owner in (None, label)][1:]
            total += math.prod(_size(domain) for domain in own)
        return total

    def points(self) -> Iterator[Point]:
        """All of them, of a finite space."""
        for label in self.alternatives:
            own = {n: d.domain for n, d in self.dimensions.items() if d.owner in (None, label)} | {
                "method": Choice((label,))
            }
            every = [d.values or range(int(d.low), int(d.high) + 1) for d in own.values()]  # type: ignore
            yield from (dict(zip(own, values)) for values in itertools.product(*every))

    def encode(self, point: Point) -> np.ndarray:
        """A point as numbers in [0, 1]: shares, 1/2 for what it has not; one number a value where there is no order,
        two different ones being 1 apart. Options with the same name and the same values, a rank of one method and that
        of another, are one number."""
        found = dict(self._columns)
        for name, value in point.items():
            column, number = self._number(name, value)
            if column in found:
                found[column] = number
        return np.array(list(found.values()) or [0.0])

    @functools.cached_property
    def _columns(self) -> dict[tuple, float]:
        """What `encode` gives where a point has nothing."""
        varied = [(name, d.domain) for name, d in self.dimensions.items() if not fixed(d.domain)]
        return {
            self._number(name, value)[0]: 0.5 if domain.ordered else 0.0
            for name, domain in varied
            for value in domain.values or (domain.at(0.5),)
        }

    def _number(self, name: str, value: Any) -> tuple[tuple, float]:
        """Which number of `encode` a value of a dimension is, and what it is there."""
        d = self.dimensions[name]
        option = name.removeprefix(f"{d.owner}.")
        return ((option, d.domain), d.domain.share(value)) if d.domain.ordered else ((option, value), math.sqrt(0.5))

    def configuration(self, point: Point, common: Configuration) -> Configuration:
        """The run of a point; what the space does not say is as in `common`."""
        a = self.alternatives[point["method"]]
        options, targets = {}, {}
        switches = self._values(point, f"{a.label}.block", a.switches) if a.switches else [1] * len(self.blocks)
        for m in a.members:
            made = self._member(point, a, m, switches)
            if made is not None:
                options[m.name], targets[m.name] = made
        if not options:
            raise GraftError("nothing is adapted: every method is left out, or every block")
        name = "+".join(options)
        if len(options) == 1:
            (options,), (where,) = options.values(), targets.values()
        else:
            where = {k: v for k, v in targets.items() if v is not None} or None
        training = {**common.training, **{k: point[k] for k in self.training}}
        return replace(common, method=name, options=options, targets=where, training=training)

    def _values(self, point: Point, name: str, every: int) -> list[Any]:
        """One for each block."""
        return [point[f"{name}.{i // every}"] for i in range(len(self.blocks))]

    def _member(
        self, point: Point, a: Alternative, m: Member, switches: Sequence[int]
    ) -> tuple[dict[str, Any], Any] | None:
        """The options of one method and its targets, or None if it is left out."""
        cls, given, here = method(m.name), {}, list(map(bool, switches))
        name = a.called(m)
        for option, domain in m.options.items():
            if not isinstance(domain, Spread):
                given[option] = point[f"{name}.{option}"]
                if _left_out(cls, option, given[option]):
                    return None
                continue
            values = self._values(point, f"{name}.{option}", domain.every)
            here = [on and not _left_out(cls, option, v) for on, v in zip(here, values)]
            given[option] = {
                "|".join(f"{re.escape(path)}(?:\\..*)?" for path, v in zip(self.blocks, values) if v == value): value
                for value in dict.fromkeys(v for v, on in zip(values, here) if on)
            }
        targets = point[f"{name}.targets"]
        if not all(here):
            if not any(here):
                return None
            every = cls.targets if targets is None else targets
            every = [every] if isinstance(every, str) else every
            parts = [[i for i, _ in group] for on, group in itertools.groupby(enumerate(here), lambda e: e[1]) if on]
            targets = [f"{t} in blocks[{part[0]}:{part[-1] + 1}]" for t in every for part in parts]
        return plain(Recipe.of(m.name, **given).hyper), plain(targets)

    def varied(self, point: Point) -> Point:
        """A point without what is the same in all points that have it."""
        return {k: v for k, v in point.items() if not fixed(self.dimensions[k].domain)}


def key(point: Point) -> str:
    """Equal for equal points."""
    return json.dumps(plain(point), sort_keys=True)


def fixed(domain: Domain) -> bool:
    """Whether there is one value only."""
    return _size(domain) == 1


def _size(domain: Domain) -> float:
    if isinstance(domain, Choice):
        return len(domain.values)
    return domain.high - domain.low + 1 if domain.whole else math.inf


def _left_out(cls: Any, option: str, value: Any) -> bool:
    return value == 0 and not isinstance(value, bool) and not hyperparameters(cls)[option].accepts(value)


# Texts.


def _alternative(text: str) -> Alternative:
    form = re.fullmatch(r"(.*?)(?:\s+in any(?:\s+(\d+))? blocks)?", text.strip())
    assert form
    parts = _split(form[1], "+") or [text]
    members = tuple(_member(part) for part in parts)
    names = [m.name for m in members]
    if twice := next((n for n in names if names.count(n) > 1), None):
        raise GraftError(f"{text!r} has {twice} twice in one chain")
    switches = int(form[2] or 1) if text.strip().endswith("blocks") and form[1] != text.strip() else None
    return Alternative("+".join(names), members, switches)


def _member(text: str) -> Member:
    form = re.fullmatch(r"\s*([\w-]+)\s*(?:\((.*?)\))?\s*(?:\s+on\s+(\S.*?))?\s*", text)
    if not form:
        raise GraftError(
            f"{text!r} names no method: write lora, lora(rank=4|8|16), or lora(rank=4:64) on attention|mlp"
        )
    cls, options = method(form[1]), {}
    for setting in _split(form[2] or "", ","):
        option, equals, value = (part.strip() for part in setting.partition("="))
        if not equals:
            raise GraftError(f"{text}: {setting!r} is no option with values, such as rank=4|8")
        if option not in hyperparameters(cls):
            Recipe.of(cls, **{option: None})  # refuses it
        options[option] = _hyper(value, cls, option, text)
    targets = tuple(_split(form[3], "|")) if form[3] else (None,)
    return Member(form[1], options, Choice(targets))


def _hyper(value: str, cls: Any, option: str, text: str) -> Domain | Spread:
    form = re.fullmatch(r"(.*?)(?:\s+per(?:\s+(\d+))? blocks?)?", value)
    assert form
    domain, hyper = domain_of(form[1], text), hyperparameters(cls)[option]
    if isinstance(domain, Interval) and not hyper.accepts(domain.low + 0.5):
        domain = replace(domain, whole=True)
    ends = domain.values if isinstance(domain, Choice) else (domain.low, domain.high)
    ends = [int(v) for v in ends] if isinstance(domain, Interval) and domain.whole else ends
    for end in ends:
        if not _left_out(cls, option, end):
            check(cls, option, end)
    return Spread(domain, int(form[2] or 1)) if form[1] != value else domain


def domain_of(text: Any, where: str) -> Domain:
    """Values or an interval, written as above."""
    parts = _split(str(text), "|")
    if not parts:
        raise GraftError(f"{where}: there are no values, such as 4|8 or 1e-4:1e-2")
    if len(parts) == 1 and (ends := re.fullmatch(r"([^:]+):([^:]+)", parts[0])):
        low, high = (_value(end.strip()) for end in ends.groups())
        if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in (low, high)) or low > high:
            raise GraftError(f"{where}: {parts[0]} is no interval: write the lower end first, such as 1e-4:1e-2")
        return Choice((low,)) if low == high else Interval(low, high)
    values = tuple(dict.fromkeys(_value(part) for part in parts))
    return Choice(tuple(sorted(values))) if Choice(values).ordered else Choice(values)


def _value(text: str) -> Any:
    if text in ("none", "None"):
        return None
    try:
        return json.loads(text)
    except ValueError:
        return text


def _split(text: str, at: str) -> list[str]:
    """At a sign outside brackets."""
    depth, parts = 0, [""]
    for sign in text:
        depth += (sign in "([{") - (sign in ")]}")
        if sign == at and depth == 0:
            parts.append("")
        else:
            parts[-1] += sign
    return [part.strip() for part in parts if part.strip()]
