"""Searchers: which point comes next. A file in this folder is one, found by itself.

A new one is a class that derives from `Searcher` with a `name`; other packages announce theirs under the entry point
"graft.searchers". Heavy imports stand inside it.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from ...core.errors import GraftError
from ...core.loading import load_all
from ..outcome import Outcome
from ..space import Point, Space, key

SEARCHERS: dict[str, type["Searcher"]] = {}
ALL = 4096  # points of a space that are looked at one by one
FEW = 8  # draws, of which one is hoped to be new


class Searcher(ABC):
    """Asked for a point, and told what it was worth; several may be asked for before the first is told.

    space       what is searched
    seed        of all that is drawn: with equal answers, equal points are asked for
    objectives  how many there are; limits: names of what must be kept to
    tables      of other tasks, as `graft.evidence.tables` has them, for those searchers that begin with what is known
    verdict     why there is no more to ask for, once `ask` gave None
    """

    name: ClassVar[str]
    most: ClassVar[int | None] = None  # objectives that it can take

    def __init__(
        self, space: Space, *, seed: int = 0, objectives: int = 1, limits: tuple[str, ...] = (),
        tables: Sequence[Mapping[str, Any]] = (),
    ):  # fmt: skip
        if self.most is not None and objectives > self.most:
            others = sorted(n for n, s in SEARCHERS.items() if s.most is None or s.most >= objectives)
            count = f"{self.most} objective{'s' * (self.most > 1)}"
            raise GraftError(f"the searcher {self.name} takes {count}, not {objectives}: choose {' or '.join(others)}")
        self.space, self.rng = space, np.random.default_rng(seed)
        self.seed, self.objectives, self.limits, self.tables = seed, objectives, limits, tables
        self.verdict: str | None = None

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "name" in vars(cls):
            SEARCHERS[cls.name] = cls

    @abstractmethod
    def ask(self) -> Point | None:
        """The next point; None where there is no more to ask for."""

    @abstractmethod
    def tell(self, point: Point, outcome: Outcome) -> None:
        """What a point was worth; also of points that were not asked for."""


class Remembering(Searcher):
    """A searcher that asks for nothing twice: it keeps what it was told in `told`, what it waits for in `waiting`.

    A file says with `propose` which of some points that are new comes next: of all, or of as many as `look` says.
    """

    look: ClassVar[int] = 512

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.told: list[tuple[Point, Outcome]] = []
        self.waiting: dict[str, Point] = {}
        self.seen: set[str] = set()
        self.all = list(self.space.points()) if self.space.size <= ALL else None

    def propose(self, points: list[Point]) -> Point | None:
        """One of these."""
        return points[0]

    def origins(self) -> list[Point]:
        """Points beside which to look, where there are too many to look at all."""
        return []

    def ask(self) -> Point | None:
        if not (points := self.new()):
            self.verdict = self.verdict or "every point of the space was tried"
            return None
        if (point := self.propose(points)) is not None:
            self.waiting[key(point)] = point
            self.seen.add(key(point))
        return point

    def tell(self, point: Point, outcome: Outcome) -> None:
        self.waiting.pop(key(point), None)
        self.seen.add(key(point))
        self.told.append((point, outcome))

    def new(self) -> list[Point]:
        """Points not asked for yet, all or some of them; the first ones drawn value by value."""
        points = [self.space.random(self.rng) for _ in range(self.look if self.all is None else FEW)]
        if self.all is None:
            points += [self.space.near(p, self.rng, 0.1) for p in self.origins() for _ in range(self.look // 8)]
        else:
            points += [self.all[i] for i in self.rng.permutation(len(self.all))]
        return self.fresh(points)

    def fresh(self, points: Iterable[Point]) -> list[Point]:
        """Those not asked for yet, each once."""
        return list({k: p for p in points if (k := key(p)) not in self.seen}.values())


def load() -> None:
    """Import every file, and those that installed packages announce."""
    load_all(__name__, "graft.searchers")


def find(name: str) -> type[Searcher]:
    """The searcher called `name`."""
    load()
    if name not in SEARCHERS:
        from ...training.messages import nearest

        raise GraftError(f"no searcher is called {name!r}: {nearest(name, SEARCHERS)}")
    return SEARCHERS[name]
