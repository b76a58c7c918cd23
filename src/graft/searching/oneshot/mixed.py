"""Mixed deltas: at each site one of several deltas, or nothing, or a sum of all of them weighted by a softmax.

A supernet is made of adapters of such deltas. What a smaller option of a method computes with are the leading rows and
columns of the largest one (weight entanglement, as in AutoFormer, https://arxiv.org/abs/2107.00651), so that all share
what they learn, and a chosen option computes what the plain method with these tensors does.
"""

import copy
import operator
import random
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ...core.delta import Delta
from ...core.errors import GraftError
from ...core.recipe import Recipe
from ...runs.contestants import Contestant

Choice = tuple[int, ...]  # the number of an option for each group of sites
_PACE = 10.0  # how many times faster than other parameters the logits of a softmax move


class Space:
    """What may be chosen at the sites of one adapter, and how choices are drawn and changed.

    options  recipes, or texts such as lora(rank=4); None or "none": nothing
    blocks   paths of modules; the sites within one of them choose together, every other one for itself
    """

    def __init__(self, options: Sequence[Any], blocks: Sequence[str] = ()):
        self.options = tuple(map(_option, options))
        self.blocks = tuple(blocks)
        if not any(self.options):
            raise GraftError("the options of a mixed delta are all None: name a method, such as lora")

    def group(self, path: str) -> str:
        """What the site at `path` chooses together with."""
        return next((b for b in self.blocks if path == b or path.startswith(f"{b}.")), path)

    def draw(self, count: int, rng: random.Random) -> Choice:
        """A choice for `count` groups: each option is as likely as any other, but not nothing everywhere."""
        while True:
            drawn = tuple(rng.randrange(len(self.options)) for _ in range(count))
            if any(self.options[k] is not None for k in drawn):
                return drawn

    def mutate(self, choice: Choice, rng: random.Random, chance: float) -> Choice:
        """Each group draws anew with this probability."""
        return tuple(rng.randrange(len(self.options)) if rng.random() < chance else k for k in choice)

    def cross(self, one: Choice, other: Choice, rng: random.Random) -> Choice:
        """Each group from one of the two."""
        return tuple(rng.choice(pair) for pair in zip(one, other))

    def part(self, whole: Mapping[str, Tensor], name: str, shape: torch.Size) -> Tensor:
        """The parameter `name` of a smaller delta out of those of the largest one."""
        found = whole.get(name)
        if found is None or found.dim() != len(shape) or any(n > m for n, m in zip(shape, found.shape)):
            raise GraftError(
                f"the parameter {name} {list(shape)} of an option is no part of the largest option of its method, with "
                f"{', '.join(f'{n} {list(t.shape)}' for n, t in whole.items())}: options of one method may differ in a "
                f"size, such as the rank"
            )
        return found[tuple(map(slice, shape))]

    def __repr__(self):
        return f"{type(self).__name__}({list(self.options)}, {list(self.blocks)})"


def _option(what: Any) -> Recipe | None:
    if what is None or what == "none":
        return None
    if not isinstance(what, str):
        return Recipe.of(what)
    named = Contestant.of(what)
    return Recipe.of(named.method, **named.options)


def mixed(space: Space, mixture: Literal["none", "outputs", "weights"] = "none", share: float = 0.5) -> Recipe:
    """The recipe of the deltas that choose within `space`. It is trained like any other, by `graft.fit`.

    mixture  none: a step trains one path, drawn anew (Single Path One-Shot, https://arxiv.org/abs/1904.00420)
             outputs: all options run, y = sum_k p_k y_k with p = softmax of logits (DARTS)
             weights: one option runs, with the tensors sum_k p_k pad(T_k), each padded with zeros to the size of the
             largest, so that activations are those of one option (TangleNAS)
    share    of the training examples that the logits learn from; everything else learns from the others

    The logits start at zero and take the optimizer's steps ten times as fast as other parameters do.
    """
    methods = list(dict.fromkeys(o.method for o in space.options if o is not None))
    first = methods[0]
    hosts = tuple(kind for kind in first.hosts if all(kind in m.hosts for m in methods))
    if not hosts or any(m.place != first.place for m in methods):
        raise GraftError(f"{' and '.join(m.name for m in methods)} have no kind of module in common to choose at")
    for m in methods:
        for hook in ("share", "step", "review", "penalty"):
            if getattr(m, hook).__func__ is not getattr(Delta, hook).__func__:
                raise GraftError(f"{m.name} cannot be an option: what it shares or schedules needs a run of its own")

    def refuses(cls, site):
        return next((reason for m in methods if (reason := m.refuses(site))), None)

    def asks(cls, hyper):
        return tuple({need for o in space.options if o is not None for need in o.method.asks(o.hyper)})

    # Where deltas go, and what they are told there, is decided by their class.
    body = {"hosts": hosts, "targets": first.targets, "place": first.place, "places": first.places}
    body |= {"refuses": classmethod(refuses), "asks": classmethod(asks), "name": "mixed"}
    body["on_codes"] = all(m.on_codes for m in methods)
    return Recipe(type(Mixed)("Mixed", (Mixed,), body), {"space": space, "mixture": mixture, "share": share})


class Paths(nn.Module):
    """What the mixed deltas of an adapter choose at present.

    groups  names, see `Space.group`; `of` gives the number of the group of a site
    now     the choice; None while all options are mixed
    logits  [groups, options], where there is a mixture
    largest by the name of a method its option with the most parameters
    """

    chosen: Tensor
    seed: Tensor
    now: Choice | None

    def __init__(self, paths: Sequence[str], space: Space, mixture: str):
        super().__init__()
        self.space, self.now = space, None
        self.largest: dict[str, Recipe] = {}
        self.groups = list(dict.fromkeys(map(space.group, paths)))
        self.of = {path: self.groups.index(space.group(path)) for path in paths}
        self.register_buffer("seed", torch.randint(2**62, ()))
        self.register_buffer("chosen", torch.zeros(len(self.groups), dtype=torch.int64))
        self.logits = None if mixture == "none" else nn.Parameter(torch.zeros(len(self.groups), len(space.options)))
        if self.logits is None:
            self.draw(0.0)

    def draw(self, progress: float) -> None:
        """A choice that depends on the seed and on how far training is, so that all processes draw the same."""
        self.use(self.space.draw(len(self.groups), random.Random(f"{int(self.seed)} {round(progress * 2**40)}")))

    def use(self, choice: Choice) -> None:
        """From now on these options alone."""
        self.chosen.copy_(torch.tensor(choice))
        self.now = tuple(choice)

    def probabilities(self) -> Tensor:
        """[groups, options], of a mixture."""
        assert self.logits is not None
        return torch.softmax(_PACE * self.logits, -1)


class Mixed(Delta):
    """y = d_k(inner, x), where d_k is the option that the group of the site chooses, or a mixture of them all.

    The largest delta of each method owns the parameters, `largest`; the other options are parts of it.
    """

    resting = True  # the first path need not reach every site
    shared: Paths

    @classmethod
    def share(cls, sites, **hyper):
        return Paths([site.path for site in sites], hyper["space"], hyper["mixture"])

    def __init__(self, site, shared, *, space: Space, mixture: str = "none", share: float = 0.5):
        super().__init__(site, shared)
        self.space, self.fraction, self.group = space, share, shared.of[site.path]
        self.padded = mixture == "weights"
        self._smaller: dict[int, Delta] = {}
        if not shared.largest:  # the first site
            sized = [(self.size(k), o) for k, o in enumerate(space.options) if o is not None]
            shared.largest = {o.method.name: o for _, o in sorted(sized, key=operator.itemgetter(0))}
        self.largest = nn.ModuleDict({name: o.method(site, **o.at(site)) for name, o in shared.largest.items()})
        if site.index == 0:
            for k in range(len(space.options)):
                self._check(k)

    def option(self, k: int) -> Delta | None:
        """The delta of the option k: the largest of its method, or one without values of its own."""
        recipe = self.space.options[k]
        if recipe is not None and recipe is self.shared.largest.get(recipe.method.name):
            return self.largest[recipe.method.name]  # type: ignore[return-value]
        if recipe is not None and k not in self._smaller:
            site = copy.copy(self.site)
            site.saved = {}  # values come from elsewhere, so none are to be found
            with torch.device("meta"):
                self._smaller[k] = recipe.method(site, **recipe.at(site))
        return self._smaller.get(k)

    def size(self, k: int) -> int:
        """Parameters of the option k at this site."""
        delta = self.option(k)
        return 0 if delta is None else sum(p.numel() for p in delta.parameters())

    def parts(self, k: int) -> dict[str, Tensor]:
        """The parameters of the option k by name, as parts of those of the largest delta."""
        delta = self.option(k)
        if delta is None:
            return {}
        whole = dict(self.largest[delta.name].named_parameters())
        return {name: self.space.part(whole, name, p.shape) for name, p in delta.named_parameters()}

    def _check(self, k: int) -> None:
        delta = self.option(k)
        if delta is None:
            return
        largest: Any = self.largest[delta.name]
        self.parts(k)  # refuses what is no part
        option, buffers = self.space.options[k], [{n: b.shape for n, b in d.named_buffers()} for d in (delta, largest)]
        if buffers[0] != buffers[1]:
            raise GraftError(f"{option} cannot be a part of a larger {delta.name}: it has buffers of its own")
        if self.padded and (len(self.largest) > 1 or _settings(delta) != _settings(largest)):
            raise GraftError(
                f"mixture='weights' needs options of one method that differ in a size only, and {option} differs in "
                f"more: for LoRA give an alpha in proportion to the rank"
            )

    def run(self, k: int, inner, *args, **kwargs):
        """What the host computes with the option k alone."""
        delta = self.option(k)
        if delta is None:
            return inner(*args, **kwargs)
        largest = self.largest[delta.name]
        if delta is largest:
            return delta(inner, *args, **kwargs)
        if delta.training != self.training:
            delta.train(self.training)
        buffers = dict(largest.named_buffers())
        return functional_call(delta, self.parts(k) | buffers, (inner, *args), kwargs)

    def forward(self, inner, *args, **kwargs):
        if self.shared.now is not None:
            return self.run(self.shared.now[self.group], inner, *args, **kwargs)
        p = self.shared.probabilities()[self.group]
        if self.padded:
            (largest,) = self.largest.values()
            return functional_call(largest, self._padded(p, largest), (inner, *args), kwargs)
        inner, outputs = _Once(inner), []
        for k in range(len(self.space.options)):
            outputs.append(self.run(k, inner, *args, **kwargs))
        if not isinstance(outputs[0], tuple):
            return _sum(p, outputs)
        return (_sum(p, [out[0] for out in outputs]), *outputs[0][1:])

    def _padded(self, p: Tensor, largest: nn.Module) -> dict[str, Tensor]:
        """sum_k p_k pad(T_k) for each parameter T."""
        mixed = {name: torch.zeros_like(t) for name, t in largest.named_parameters()}
        for k in range(len(self.space.options)):
            for name, t in self.parts(k).items():
                room = [n for m, full in zip(reversed(t.shape), reversed(mixed[name].shape)) for n in (0, full - m)]
                mixed[name] = mixed[name] + p[k].to(t.dtype) * F.pad(t, room)
        return mixed

    @classmethod
    def step(cls, deltas, progress):
        if deltas[0].shared.logits is None:
            deltas[0].shared.draw(progress)

    @classmethod
    def aside(cls, deltas, count):
        return 0 if deltas[0].shared.logits is None else max(1, round(deltas[0].fraction * count))

    @classmethod
    def review(cls, deltas, progress, trial):
        logits = deltas[0].shared.logits
        if logits is not None:
            (logits.grad,) = trial.gradients([logits], aside=True)

    def loaded(self):
        if self.shared.logits is None:
            self.shared.now = tuple(self.shared.chosen.tolist())


class _Once:
    """`inner`, which computes once for the same arguments."""

    def __init__(self, inner):
        self._inner, self._seen = inner, None

    def __call__(self, *args, **kwargs):
        given = (*args, *kwargs, *kwargs.values())
        if self._seen is None or len(given) != len(self._seen[0]) or any(map(operator.is_not, given, self._seen[0])):
            self._seen = given, self._inner(*args, **kwargs)
        return self._seen[1]

    def __getattr__(self, name):
        return getattr(self._inner, name)


def _sum(p: Tensor, outputs: Sequence[Tensor]) -> Tensor:
    return sum(q.to(y.dtype) * y for q, y in zip(p, outputs))  # type: ignore[return-value]


def _settings(delta: Delta) -> dict[str, float]:
    """Its numbers that no size tells, such as a scaling."""
    return {k: v for k, v in vars(delta).items() if isinstance(v, float)}
