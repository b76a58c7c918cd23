"""The algebra of adapters: weighted sums and other combinations of what adapters change, kept as a new adapter.

All of it is on the change of each tensor, dW = W' - W and db = b' - b of every adapter by itself against the base, so
that ranks, alphas, scalings and methods may differ.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..core import files
from ..core.adapter import Adapter
from ..core.delta import Delta, is_finite
from ..core.errors import GraftError
from ..core.host import base_modules
from ..core.hyper import check, keywords
from ..core.progress import shown
from ..core.recipe import ByPath, Recipe
from ..core.registry import adapters, registry, unwrapped
from ..core.site import site_for
from ..core.sites.linear import LinearSite
from ..methods.weight.lora import LoRA
from . import entrywise
from .change import (
    MATRICES,
    Change,
    added,
    change_of,
    dense,
    is_low_rank,
    new_state,
    own_state,
    scaled,
    size,
    wide,
)
from .keep import Kept, Loss, as_lora, as_shira

FORMS = ("lora", "shira", "full")


@dataclass
class Combination:
    """A new adapter and how far it is from what was asked for.

    adapter  on the model
    error    ||dW - dW'||_F / ||dW||_F over all adapted modules, dW asked for and dW' kept
    errors   the same by module
    exact    whether nothing but rounding was lost
    """

    adapter: Adapter
    error: float
    errors: dict[str, float] = field(repr=False)
    exact: bool


class Source(NamedTuple):
    """What takes part in a combination: deltas by path, their recipe, which of the paths are heads, and a weight."""

    deltas: Mapping[str, Delta]
    recipe: Recipe
    heads: set[str]
    weight: float


@torch.no_grad()
def combine(
    model: nn.Module,
    weights: Mapping[str, float],
    method: str = "sum",
    *,
    name: str = "combined",
    rank: int | None = None,
    into: str | None = None,
    seed: int = 0,
    **options: Any,
) -> Combination:
    """Make one adapter of several which are on `model`.

    weights  {name of an adapter: its weight}; -1 negates, and so subtracts
    method   "sum"        sum_i w_i dW_i
             "cat"        the same for low-rank changes only: their factors side by side, the ranks add up
             "ties"       TIES of the w_i dW_i, option density (0.2): trim, elect sign, disjoint mean
             "dare"       the sum of the w_i dW_i with random entries dropped, the rest rescaled, option density (0.1)
             "dare_ties"  these with TIES' election and mean, option density (0.1)
             "magnitude"  the sum of the largest entries of each w_i dW_i, option density
    name     of the new adapter
    rank     at most this for a LoRA: the nearest one, by singular values
    into     the method that keeps the result: "lora", "shira" (the entries that are not zero), "full", or the one that
             all adapters have, where the change is linear in its tensors. Left out: LoRA if a rank is given; else
             what is exact and smallest of the adapters' own method, "shira" where all change chosen entries only, LoRA
             with the factors side by side, and "full"
    seed     of the random entries of DARE

    A single adapter with weight 1 gives a copy of itself, whatever its method. Heads, norms and modules that hold no
    matrix are kept whole (they count as heads of the new adapter), by the same arithmetic on each of their tensors,
    against the base's. Modules which an adapter leaves alone count as zero change.

    The new adapter is frozen and runs in the place of the others, which stay on the model without effect. GraftError
    for adapters that change no weights, and wherever `into` cannot hold the result.
    """
    model = unwrapped(model)
    taken = _taken(model, weights, name)
    arithmetic, first = _arithmetic(method, options), next(iter(taken.values()))
    if method == "sum" and [*weights.values()] == [1] and rank is None and into in (None, first.recipe.method.name):
        adapter = _built(model, files.content(first), name)
        return attached(adapter, dict.fromkeys(adapter.deltas, Loss()), weights)
    for label, adapter in taken.items():
        if not is_finite(adapter.state_dict().values()):
            raise GraftError(f"adapter {label!r} holds NaN or infinity: nothing was combined")
        if bad := next((d for d in adapter.deltas.values() if not d.mergeable()), None):
            raise GraftError(
                f"adapter {label!r} cannot be combined: {bad.name} is no change of weights that could be added; "
                f"graft.activate(model, {', '.join(map(repr, weights))}) runs the adapters in a chain"
            )
    sources = [Source(a.deltas, a.recipe, {path for path, _ in a.heads}, weights[n]) for n, a in taken.items()]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        plan = Plan(model, sources, arithmetic)
        if method == "cat":
            if rank is not None or into not in (None, "lora"):
                raise GraftError('cat puts factors side by side, as a LoRA of their ranks\' sum: take "sum" instead')
            into = "lora"
            if whole := [path for path in plan.sites if not plan.is_low_rank(path)]:
                raise GraftError(f'the change at {whole[0]} has no low-rank factors to put side by side: take "sum"')
        done = plan.keep(name, rank, into, _common([a.task for a in taken.values()]))
    return attached(*done, weights)


def convert(
    model: nn.Module, adapter: str, *, rank: int | None = None, into: str = "lora", name: str = "converted"
) -> Combination:
    """Make another method's adapter of the one called `adapter`: combine(model, {adapter: 1.0}, into=into, rank=rank).

    rank  of a LoRA, at most; without it the one that loses nothing but rounding, which may be the full rank
    into  the other method: "lora", "shira" (the entries that change) or "full"
    name  of the new adapter, which runs in the place of the other one
    """
    return combine(model, {adapter: 1.0}, name=name, rank=rank, into=into)


class Plan:
    """What is combined and where: `sites` are modules with a matrix, `wholes` modules that are kept whole."""

    def __init__(self, model: nn.Module, sources: list[Source], arithmetic: Callable | None = None):
        self.model, self.sources, self.linear = model, sources, arithmetic is None
        self.arithmetic = arithmetic or (lambda changes: torch.stack(changes).sum(0))
        self.modules = base_modules(model)
        methods = {s.recipe.method for s in sources}
        self.own = methods.pop() if len(methods) == 1 else None
        paths = dict.fromkeys(path for s in sources for path in s.deltas)
        heads = {path for s in sources for path in s.heads}
        kinds = {path: site_for(path, self.modules[path], (*MATRICES, "norm", "module")).kind for path in paths}
        self.heads = outermost(p for p in paths if p in heads)
        self.wholes = outermost(p for p in paths if p in heads or kinds[p] not in MATRICES)
        self.sites = [p for p in paths if not inside(p, self.wholes)]

    def keep(
        self, name: str, rank: int | None, into: str | None, task: dict[str, Any] | None = None
    ) -> tuple[Adapter, dict[str, Loss]]:
        """The adapter, and what is lost by module."""
        own, into = self.own, into or self._natural(rank)
        if rank is not None:
            check(LoRA, "rank", rank)
        if rank is not None and into != "lora":
            raise GraftError(f"a rank is for lora, not for {into}: leave it out")
        if own is not None and into == own.name and into not in FORMS:
            if not (self.linear and self._is_linear_in(own)):
                raise GraftError(f"the combination is no {into} adapter: choose into={' or '.join(map(repr, FORMS))}")
            wholes = self.heads
            makers = {p: partial(self._in_tensors, p) for p in self._paths(wholes)}
        elif into == "full":
            wholes = self.heads if self._paths(self.heads) else []
            makers = {p: partial(self._as_full, p) for p in outermost(self._paths(wholes))}
        elif into in FORMS:
            form, wholes = partial(as_lora, rank=rank) if into == "lora" else as_shira, self.wholes
            makers = {p: partial(self._formed, p, form) for p in self.sites}
        else:
            known = [*FORMS, own.name] if own and own.neutral else FORMS
            raise GraftError(f"into is {' or '.join(known)}, not {into!r}")
        if not makers:
            raise GraftError(f'no matrix changes, which {into} could adapt: choose into="full"')
        for path in wholes:
            makers[path] = partial(self._as_full, path)
        kept = {path: makers[path]() for path in shown([*makers], "combining")}
        tensors = {f"{path}:{k}": t for path, one in kept.items() for k, t in one.tensors.items()}
        paths = [path for path in kept if path not in wholes]
        recipe = Recipe.of(into, **_hyper([kept[path] for path in paths], paths))
        saved = files.Saved(recipe, paths, [*wholes], tensors, targets=paths, task=task or {})
        return _built(self.model, saved, name), {path: one.loss for path, one in kept.items()}

    def is_low_rank(self, path: str) -> bool:
        return all(is_low_rank(s.deltas[path]) for s in self.sources if path in s.deltas)

    def _natural(self, rank: int | None) -> str:
        if rank is not None:
            return "lora"
        if self.own is not None and self.linear and self._is_linear_in(self.own):
            return self.own.name
        if self.sites and all(d.entries() is not None for path in self.sites for d, _ in self._at(path)):
            return "shira"
        return "lora" if self.linear and self.sites and all(map(self.is_low_rank, self.sites)) else "full"

    def _paths(self, wholes: list[str]) -> list[str]:
        return [p for p in dict.fromkeys(p for s in self.sources for p in s.deltas) if not inside(p, wholes)]

    def _at(self, path: str) -> list[tuple[Delta, Source]]:
        return [(s.deltas[path], s) for s in self.sources if path in s.deltas]

    # As the tensors of the adapters' own method

    def _is_linear_in(self, cls: type[Delta]) -> bool:
        """Whether tensors of one shape and meaning meet at every module, in which the change is linear."""
        at_module = map(self._at, self._paths(self.heads))
        return bool(cls.neutral) and all(
            found[0][0].neutral and all(_alike(found[0], other) for other in found[1:]) for found in at_module
        )

    def _in_tensors(self, path: str) -> Kept:
        found = self._at(path)
        (first, source), states = found[0], [(d.state_dict(), s.weight) for d, s in found]
        tensors = dict(states[0][0])
        for key in tensors.keys() & first.neutral.keys():
            zero = first.neutral[key]
            tensors[key] = zero + torch.stack([w * (state[key] - zero) for state, w in states]).sum(0)
        return Kept(source.recipe.at(first.site), tensors)

    # As a change of the matrix

    def _formed(self, path: str, form: Callable[[LinearSite, Change], Kept]) -> Kept:
        site: Any = site_for(path, self.modules[path], MATRICES)
        changes = [(change_of(delta), source.weight) for delta, source in self._at(path)]
        matrices = [scaled(c.matrix, w) for c, w in changes]
        biases = [w * c.bias for c, w in changes if c.bias is not None]
        matrix = added(matrices) if self.linear else self.arithmetic([dense(m) for m in matrices])
        rounding = sum(abs(w) * c.rounding for c, w in changes)
        return form(site, Change(matrix, self.arithmetic(biases) if biases else None, rounding))

    # As all tensors of the module

    def _as_full(self, path: str) -> Kept:
        prefix = f"{path}." if path else ""
        base = own_state(self.modules[path])
        changes: dict[str, list[Tensor]] = {name: [] for name in base}
        for source in self.sources:
            for inner in source.deltas:
                if inner != path and not inner.startswith(prefix):
                    continue
                for name, new in new_state(source.deltas[inner]).items():
                    full = f"{inner}.{name}".strip(".")
                    key = full.removeprefix(prefix)
                    if key not in base:
                        raise GraftError(f'{full} is new, which full cannot add: choose into="lora"')
                    if new.shape != base[key].shape:
                        raise GraftError(
                            f"{full} has shape {tuple(new.shape)} in an adapter and {tuple(base[key].shape)} in the "
                            f"model: a head of another size has no difference from the base's that could be combined"
                        )
                    if new.is_floating_point():
                        changes[key].append(source.weight * (wide(new) - wide(base[key])))
        combined = {key: self.arithmetic(own) for key, own in changes.items() if own}
        tensors = {f"copy.{k}": wide(t) + combined[k] if k in combined else t for k, t in base.items()}
        return Kept({}, tensors, Loss(math.hypot(*map(size, combined.values()))))


def _taken(model: nn.Module, weights: Mapping[str, float], name: str) -> dict[str, Adapter]:
    """The adapters that `weights` names."""
    found = registry(model)
    if found is None:
        raise GraftError(f"{type(model).__name__} carries no adapter")
    found.check_unmerged()
    here = adapters(model)
    if not weights:
        raise GraftError(f"weights names no adapter; the model has {', '.join(here)}")
    if missing := [n for n in weights if n not in here]:
        raise GraftError(f"no adapter is called {missing[0]!r}; the model has {', '.join(here)}")
    if bad := [n for n, w in weights.items() if not isinstance(w, int | float) or not math.isfinite(w)]:
        raise GraftError(f"the weight of {bad[0]!r} must be a number, not {weights[bad[0]]!r}")
    if name in here:
        raise GraftError(f"the model has an adapter called {name!r} already: choose another name")
    return {n: here[n] for n in weights}


def _arithmetic(method: str, options: dict[str, Any]) -> Callable[[list[Tensor]], Tensor] | None:
    """What a method does with the changes of a tensor, or None if it adds them."""
    if method not in (methods := ["sum", "cat", *entrywise.names()]):
        raise GraftError(f"method is {' or '.join(methods)}, not {method!r}")
    function = None if method in ("sum", "cat") else entrywise.find(method)
    known = {} if function is None else keywords(function)
    for key, value in options.items():
        if key not in known:
            hint = f"; it has {', '.join(known)}" if known else ""
            raise GraftError(f"{method} has no option {key!r}{hint}")
        if not known[key].accepts(value):
            raise GraftError(f"{method}: {key} must be {known[key].allowed()}, not {value!r}")
    if missing := [key for key, one in known.items() if one.required and key not in options]:
        raise GraftError(f"{method} needs {missing[0]}: {known[missing[0]].doc}")
    return None if function is None else partial(function, **options)


def _built(model: nn.Module, saved: files.Saved, name: str) -> Adapter:
    adapter = files.build(model, saved, name)
    adapter.load_state_dict(saved.tensors)
    adapter.task = saved.task
    return adapter


def attached(adapter: Adapter, losses: dict[str, Loss], replaced: Iterable[str] = ()) -> Combination:
    """Put the adapter on the model, frozen, in the place of those that it replaces, and report what is lost."""
    adapter.requires_grad_(False)
    adapter.attach()
    found = registry(adapter.model)
    assert found
    found.activate(n for n in found.active if n not in replaced)
    total = Loss(*(math.hypot(*norms) for norms in zip(*losses.values())))
    errors = {path: loss.error for path, loss in losses.items()}
    return Combination(adapter, total.error, errors, all(loss.exact for loss in losses.values()))


def _alike(one: tuple[Delta, Source], other: tuple[Delta, Source]) -> bool:
    """Whether two deltas of one method differ in nothing but the values of the tensors in which they are linear."""
    (a, source_a), (b, source_b) = one, other
    if a.shared is not None or source_a.recipe.at(a.site) != source_b.recipe.at(b.site):
        return False
    mine, theirs = a.state_dict(), b.state_dict()
    return mine.keys() == theirs.keys() and all(
        t.shape == theirs[key].shape and (key in a.neutral or torch.equal(t, theirs[key])) for key, t in mine.items()
    )


def _hyper(kept: list[Kept], paths: list[str]) -> dict[str, Any]:
    """The hyperparameters of all modules; as a table where they differ."""
    found = {}
    for key, value in kept[0].hyper.items():
        values = [one.hyper[key] for one in kept]
        found[key] = value if all(v == value for v in values) else ByPath(zip(paths, values))
    return found


def _common(tasks: list[dict[str, Any]]) -> dict[str, Any]:
    """What all say."""
    return {key: value for key, value in tasks[0].items() if all(t.get(key) == value for t in tasks)}


def inside(path: str, outer: list[str]) -> bool:
    """Whether a module is one of `outer`, or in one of them."""
    return any(path == o or not o or path.startswith(f"{o}.") for o in outer)


def outermost(paths) -> list[str]:
    found: list[str] = []
    for path in sorted(paths, key=len):
        if not inside(path, found):
            found.append(path)
    return found
