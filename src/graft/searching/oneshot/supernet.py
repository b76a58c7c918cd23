"""A supernet: mixed adapters on one model, trained together; its paths are adaptations of the plain kind."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

from ...core.adapter import Adapter, attach
from ...core.errors import GraftError
from ...core.recipe import ByPath, Recipe
from ...core.targets import resolve
from ...models import Base
from ...runs.contestants import title
from ...training import fit
from ...training.data import Examples
from ...training.evaluation import choose, half, measure
from .mixed import Choice, Mixed, Paths, Space, mixed

Path = tuple[Choice, ...]  # one of each adapter of a supernet


def blocks(model: nn.Module) -> list[str]:
    """The paths of the repeated blocks of a model."""
    return [path for path, _ in resolve(model, "blocks", ("module",))]


def _outside(base: Base, recipe: Recipe, targets: Any) -> Any:
    """Targets without what lies in new heads, which are trained whole."""
    paths = [path for path, _ in resolve(base.model, targets or recipe.method.targets, recipe.method.hosts)]
    rest = {path for path in paths if not any(path == head or path.startswith(f"{head}.") for head in base.heads)}
    return targets if len(rest) == len(paths) else lambda path, module: path in rest


class Member(NamedTuple):
    """One adapter of a supernet: what it may choose, where, and how (see `mixed`)."""

    space: Space
    targets: Any = None
    mixture: Any = "none"
    share: float = 0.5


@dataclass
class Found:
    """What a one-shot search found: ordinary recipes, to train anew with `graft.tune(model, data, **found.plan())`.

    recipes     methods with hyperparameters, which may differ by module, innermost first
    targets     the paths of the modules of each
    parameters  that they train, without heads
    table       one row for each path that was looked at: what it chooses, parameters, and metrics with the weights that
                it inherits from the supernet; the best one first
    others      the next best, where more than one path is kept
    """

    recipes: list[Recipe]
    targets: list[list[str]]
    parameters: int
    table: list[dict[str, Any]] = field(default_factory=list)
    others: list["Found"] = field(default_factory=list)

    def plan(self) -> dict[str, Any]:
        """`method` and `targets`, as `graft.tune` takes them."""
        if len(self.recipes) == 1:
            return {"method": self.recipes[0], "targets": self.targets[0]}
        names = [r.method.name for r in self.recipes]
        called = [f"{n}-{names[: i + 1].count(n)}" if n in names[:i] else n for i, n in enumerate(names)]
        return {"method": self.recipes, "targets": dict(zip(called, self.targets))}


class Supernet:
    """Mixed adapters on the model of a base, and a head where the base lacks one, until the `with` block ends.

    members   adapters by name, innermost first
    seed      of initial values, of the order of the data and of the paths that are drawn
    """

    def __init__(self, base: Base, members: Mapping[str, Member], seed: int = 0):
        self.base, self.seed = base, seed
        self.adapters: dict[str, Adapter] = {}
        last = list(members)[-1]
        try:
            for number, (name, m) in enumerate(members.items()):
                recipe = mixed(m.space, m.mixture, m.share)
                self.adapters[name] = attach(
                    base.model, recipe, _outside(base, recipe, m.targets), name=name,
                    heads=base.heads if name == last else (), seed=seed + number,
                )  # fmt: skip
        except GraftError:
            self.close()
            raise
        self.paths: list[Paths] = [a.shared for a in self.adapters.values()]  # type: ignore[misc]

    def __enter__(self) -> "Supernet":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def close(self) -> None:
        """Give the base back as it was."""
        for adapter in reversed(self.adapters.values()):
            adapter.detach()
        self.adapters = {}

    def train(self, examples: Examples, steps: int, **training: Any) -> None:
        """`graft.fit` of all that is attached; `training` is what it takes."""
        given = {"objective": self.base.objective or "auto", "processor": self.base.processor, "progress": False}
        fit(self.base.model, examples, steps=steps, seed=self.seed, **(given | training))

    # Paths

    def draw(self, rng: random.Random) -> Path:
        return tuple(p.space.draw(len(p.groups), rng) for p in self.paths)

    def mutate(self, path: Path, rng: random.Random, chance: float = 0.2) -> Path:
        return tuple(p.space.mutate(choice, rng, chance) for p, choice in zip(self.paths, path))

    def cross(self, one: Path, other: Path, rng: random.Random) -> Path:
        return tuple(p.space.cross(a, b, rng) for p, a, b in zip(self.paths, one, other))

    def use(self, path: Path) -> None:
        """Run this path alone."""
        for p, choice in zip(self.paths, path):
            p.use(choice)

    def likeliest(self, cap: int | None = None) -> Path:
        """Of a mixture the path of the largest product of probabilities with 1 to `cap` parameters.

        Without a cap these are the likeliest options; it is an integer programme, which scipy solves exactly.
        """
        import numpy as np
        from scipy.optimize import Bounds, LinearConstraint, milp

        chances = [p.probabilities().detach().double().log().tolist() for p in self.paths]
        every = [
            (f, g, k)
            for f, p in enumerate(self.paths)
            for g in range(len(p.groups))
            for k in range(len(p.space.options))
        ]
        sizes = [sum(d.size(k) for d in self.deltas(f) if d.group == g) for f, g, k in every]
        owners = list(dict.fromkeys((f, g) for f, g, _ in every))
        one_each = [[float((f, g) == owner) for f, g, _ in every] for owner in owners]
        solved = milp(
            np.array([-chances[f][g][k] for f, g, k in every]), integrality=np.ones(len(every)), bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(np.array(one_each), 1, 1),
                LinearConstraint(np.array([sizes], dtype=float), 1, np.inf if cap is None else cap),
            ],
        )  # fmt: skip
        if solved.x is None:
            raise too_small(cap)
        chosen = {(f, g): k for (f, g, k), x in zip(every, solved.x) if x > 0.5}
        return tuple(tuple(chosen[f, g] for g in range(len(p.groups))) for f, p in enumerate(self.paths))

    def deltas(self, number: int) -> list[Mixed]:
        """The mixed deltas of one of the adapters."""
        return [d for d in list(self.adapters.values())[number].deltas.values() if isinstance(d, Mixed)]

    def parameters(self, path: Path) -> int:
        """That a path trains, without heads."""
        return sum(d.size(choice[d.group]) for f, choice in enumerate(path) for d in self.deltas(f))

    def describe(self, path: Path) -> dict[str, str]:
        """{"adapter group": option}."""
        return {
            f"{name} {group}": "none" if (o := p.space.options[k]) is None else title(o.method.name, o.hyper)
            for name, p, choice in zip(self.adapters, self.paths, path)
            for group, k in zip(p.groups, choice)
        }

    def found(self, path: Path, table: Sequence[dict[str, Any]] = ()) -> Found:
        """A path as ordinary recipes."""
        recipes, targets = [], []
        for f, (p, choice) in enumerate(zip(self.paths, path)):
            at = {d.site: p.space.options[choice[d.group]] for d in self.deltas(f)}
            for cls in dict.fromkeys(o.method for o in at.values() if o is not None):
                own = {site.path: o.at(site) for site, o in at.items() if o is not None and o.method is cls}
                hypers = list(own.values())
                recipes.append(Recipe(cls, {
                    key: value if all(h[key] == value for h in hypers) else ByPath({w: h[key] for w, h in own.items()})
                    for key, value in hypers[0].items()
                }))  # fmt: skip
                targets.append(list(own))
        return Found(recipes, targets, self.parameters(path), list(table))


class Judge:
    """The metrics of the paths of a supernet on examples that it was not trained on."""

    def __init__(self, supernet: Supernet, examples: Examples, batch_size: int = 64):
        base = supernet.base
        self.supernet, self.batch_size = supernet, batch_size
        self.task = choose(base.objective or "auto", examples, base.model)(
            base.model, base.processor, max_length=base.max_length
        )
        self.features = self.task.features(examples)
        self.seen: dict[Path, dict[str, float]] = {}

    def score(self, path: Path) -> tuple[float, float]:
        """The first metric of the objective, and the loss where that does not decide; more is better."""
        if path not in self.seen:
            model = self.supernet.base.model
            device = next(model.parameters()).device
            self.supernet.use(path)
            self.seen[path] = measure(
                model, self.task, self.features, self.batch_size, device, half(model, "auto", device)
            )
        metrics, first = self.seen[path], next(iter(self.task.metrics))
        return (metrics[first] if self.task.metrics[first] else -metrics[first]), -metrics["loss"]

    def table(self) -> list[dict[str, Any]]:
        """One row for each path that was scored, the best one first."""
        order = sorted(self.seen, key=self.score, reverse=True)
        return [{"parameters": self.supernet.parameters(p), **self.seen[p], **self.supernet.describe(p)} for p in order]


def too_small(cap: int | None) -> GraftError:
    return GraftError(f"cap={cap}: no path of the supernet was found with 1 to {cap} parameters: raise the cap")
