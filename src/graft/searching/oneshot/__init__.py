"""One-shot search: one training run of a supernet, whose weights tell which of its paths to train anew.

found = graft.searching.oneshot.search("graft:sprout", "task:digits", method="noah", cap=20_000)
graft.tune("graft:sprout", "task:digits", **found.plan())

mixed       a delta that is one of several, or a mixture of them
supernet    adapters of these, their paths, and how a path becomes ordinary recipes
evolution   search among the paths
methods     one file a way to search, found by itself
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, ClassVar

from ...core.errors import GraftError
from ...core.hyper import Range, keywords
from ...core.loading import load_all
from ...core.progress import shown
from ...models import Base, architecture, load_base
from ...training.data import Examples, held_out, read
from ...training.evaluation import choose
from ...training.messages import nearest
from .evolution import evolve
from .supernet import Found, Judge, Member, Supernet, too_small

ONESHOT: dict[str, type["OneShot"]] = {}


@dataclass
class Budget:
    """What a search may spend.

    steps       of the optimizer, in which the supernet is trained
    cap         parameters of a path at most, without heads
    paths       how many are scored, where paths are scored
    validation  share of the examples that paths are scored on; the supernet is trained on the others
    seed        of all that is drawn
    training    what `graft.fit` takes besides
    """

    steps: int = 300
    cap: int | None = None
    paths: int = 200
    validation: float = 0.2
    seed: int = 0
    training: Mapping[str, Any] = field(default_factory=dict)


class OneShot(ABC):
    """A way to search. Its keyword-only arguments are its settings, documented as those of a method are."""

    name: ClassVar[str]

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if "name" in vars(cls):
            ONESHOT[cls.name] = cls

    @abstractmethod
    def members(self, base: Base) -> dict[str, Member]:
        """The adapters of the supernet by name, innermost first."""

    @abstractmethod
    def find(self, base: Base, data: Examples, budget: Budget) -> Found:
        """What to train anew. The base is afterwards as it was before."""


class SinglePath(OneShot):
    """Each step trains one path, drawn at random; then evolution among the paths, with the weights they inherit."""

    keep = 1  # of the best paths

    def find(self, base: Base, data: Examples, budget: Budget) -> Found:
        examples, held = held_out(data, budget.validation, budget.seed)
        with Supernet(base, self.members(base), budget.seed) as net:
            net.train(examples, budget.steps, **budget.training)
            judge, numbers = Judge(net, held), range(budget.paths)
            most = float("inf") if budget.cap is None else budget.cap
            telling = shown(numbers, "scoring paths") if budget.training.get("progress") else (n for n in numbers)

            def score(path: Any) -> tuple[float, float]:
                next(told)
                return judge.score(path)

            with closing(telling) as told:
                scores = evolve(
                    net.draw, net.mutate, net.cross, score, lambda path: 0 < net.parameters(path) <= most,
                    scored=budget.paths, seed=budget.seed,
                )  # fmt: skip
            if not scores:
                raise too_small(budget.cap)
            first, *others = islice(scores, self.keep)
            return replace(net.found(first, judge.table()), others=[net.found(path) for path in others])


class Softmax(OneShot):
    """All options run in every step, weighted by a softmax whose logits learn from data kept aside; then the likeliest
    path within the cap."""

    def find(self, base: Base, data: Examples, budget: Budget) -> Found:
        with Supernet(base, self.members(base), budget.seed) as net:
            net.train(data, budget.steps, **budget.training)
            path = net.likeliest(budget.cap)
            chances = {
                f"{name} {group}": [round(p, 4) for p in row]
                for name, paths in zip(net.adapters, net.paths)
                for group, row in zip(paths.groups, paths.probabilities().tolist())
            }
            row = {"parameters": net.parameters(path), **net.describe(path), "probabilities": chances}
            return net.found(path, [row])


def names() -> list[str]:
    """The ways to search."""
    load_all(f"{__name__}.methods")
    return sorted(ONESHOT)


def find(name: str) -> type[OneShot]:
    """The way to search called `name`."""
    names()
    if name not in ONESHOT:
        raise GraftError(f"no one-shot search is called {name!r}: {nearest(name, ONESHOT)}")
    return ONESHOT[name]


def search(
    model: str | Path,
    data: Any,
    *,
    method: Annotated[str, "how to search, one of `names()`"] = "noah",
    options: Annotated[Mapping | None, "settings of that method"] = None,
    cap: Annotated[int | None, "trained parameters at most, without heads", Range(1)] = None,
    steps: Annotated[int, "optimizer steps of the supernet", Range(1)] = 300,
    paths: Annotated[int, "paths that are scored, where paths are scored", Range(1)] = 200,
    validation: Annotated[float, "share of the data to score paths on", Range(above=0, below=1)] = 0.2,
    columns: Annotated[Mapping | None, "{name that is needed: name in the data}"] = None,
    seed: Annotated[int, "of all that is drawn", Range(0)] = 0,
    **training: Any,
) -> Found:
    """Train a supernet on a model and data once, and read out which methods and sizes to train anew, and where.

    model     as for `graft.tune`
    data      as for `graft.tune`
    training  what `graft.fit` takes: batch_size, learning_rate, ...

    Raises `GraftError` for an unknown method or setting, and where no path keeps to the cap.
    """
    cls, given = find(method), dict(options or {})
    if unknown := given.keys() - keywords(cls.__init__).keys():
        raise GraftError(f"{method} has no setting {min(unknown)!r}: {nearest(min(unknown), keywords(cls.__init__))}")
    for name, value in given.items():
        if not (known := keywords(cls.__init__)[name]).accepts(value):
            raise GraftError(f"{method}: {name} must be {known.allowed()}, not {value!r}")
    examples = read(data, columns=columns)
    objective = choose(training.pop("objective", "auto"), examples, architecture(model)).name
    base = load_base(model, objective=objective, examples=examples, dtype="float32", seed=seed)
    return cls(**given).find(base, examples, Budget(steps, cap, paths, validation, seed, training))
