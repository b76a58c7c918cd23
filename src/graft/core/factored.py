"""Low-rank updates and how their factors start.

A method W' = W + B A (perhaps inside something else) derives from `Factored`; an initialisation derives from `Init`, is
one file under graft/inits/, and serves every such method:

    graft.LoRA(rank=8, init="pissa")        graft.DoRA(init="corda,mode=knowledge")
"""

import functools
import json
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .delta import Delta, Paper
from .errors import GraftError
from .hyper import Rule, check, hyperparameters

INITS: dict[str, type["Init"]] = {}
RANDOM = "random"  # the start that a method gives itself


class Init:
    """How the factors A [rank, in] and B [out, rank] of an update s B A start. Subclass it once per initialisation.

    The keyword-only arguments of `__init__` are its options, as those of a method are (see hyper.py).
    Where `taken_off` is set, the method takes the product B A at the start off W: the adapted model starts as the base.
    """

    name: str = ""
    papers: tuple[Paper, ...] = ()
    known: str = ""  # as of a method
    needs: tuple[str, ...] = ()  # statistics of the site, see statistics.py and `asks`
    hosts: tuple[str, ...] = ("linear", "conv", "embedding")  # kinds of sites on which it is right
    taken_off = False  # whether the start is taken off W
    starts_as_base = True  # whether the adapted model computes what the base computes at the start

    def __init_subclass__(cls, name: str = "", **kwargs):
        super().__init_subclass__(**kwargs)
        if name:
            cls.name = name
            INITS[name] = cls

    def asks(self, hyper: dict[str, Any]) -> tuple[str, ...]:
        """The statistics that are needed for a delta with these hyperparameters."""
        return self.needs

    def factors(self, site: Any, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
        """A [rank, in] and B [out, rank] at `site`, of an update scaling * B A."""
        raise NotImplementedError

    def plan(self, sites: list, hypers: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """As `Delta.plan`."""
        return hypers

    def triplets(
        self, site: Any, matrix: Tensor, count: int, niter: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """U [out, count], the singular values [count] and V [count, in] of the `count` largest singular values.

        With `niter` they come from so many iterations on a random subspace of twice the size (Halko et al., 2011).
        """
        self.check_rank(site, count, min(matrix.shape))
        matrix = wide(matrix)
        if niter is None:
            U, S, V = torch.linalg.svd(matrix, full_matrices=False)
        else:
            U, S, V = torch.svd_lowrank(matrix, q=min(2 * count, *matrix.shape), niter=niter)
            V = V.T
        return U[:, :count], S[:count], V[:count]

    def check_rank(self, site: Any, asked: int, most: int) -> None:
        if asked > most:
            raise GraftError(
                f"{self.name} finds {most} directions at {site.path}, and {asked} are needed: lower the rank"
            )


def wide(t: Tensor) -> Tensor:
    """In float32 at least."""
    return t.detach().to(torch.promote_types(t.dtype, torch.float32))


def unit(rows: Tensor) -> tuple[Tensor, Tensor]:
    """[k, n] as rows of length 1 and their lengths [k]; rows of zeros stay."""
    sizes = torch.linalg.vector_norm(rows, dim=1)
    return rows / sizes.clamp(min=torch.finfo(rows.dtype).tiny)[:, None], sizes


@functools.cache
def initialisation(text: str) -> Init | None:
    """The initialisation for "name" or "name,option=value,..."; None for the method's own."""
    from .. import inits

    inits.load()
    name, *options = text.split(",")
    if name == RANDOM and not options:
        return None
    if name not in INITS:
        raise GraftError(f"no initialisation is called {name!r}; there are {', '.join([RANDOM, *sorted(INITS)])}")
    cls, given = INITS[name], {}
    known = hyperparameters(cls)
    for option in options:
        key, equals, value = option.partition("=")
        if not equals or key not in known:
            shown = ", ".join(f"{k}=..." for k in known) or "no options"
            raise GraftError(f"the initialisation {name} has {shown}, not {option!r}")
        given[key] = _value(value)
        check(cls, key, given[key])
    return cls(**given)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _reason(value: Any) -> str | None:
    try:
        initialisation(value)
    except GraftError as error:
        return str(error)


Start = Annotated[
    str, 'how the factors start: "random", or an initialisation with its options ("pissa", "corda,mode=knowledge")',
    Rule(_reason),
]  # fmt: skip


class Initialised(Delta):
    """A delta with a hyperparameter `init: Start = "random"`."""

    @classmethod
    def asks(cls, hyper):
        init = initialisation(hyper.get("init", RANDOM))
        return cls.needs if init is None else (*cls.needs, *init.asks(hyper))

    @classmethod
    def plan(cls, sites, hypers):
        alike: dict[str, list] = {}
        for site in sites:
            alike.setdefault(hypers[site.path].get("init", RANDOM), []).append(site)
        planned = {}
        for text, some in alike.items():
            init, own = initialisation(text), {site.path: hypers[site.path] for site in some}
            planned |= own if init is None else init.plan(some, own)
        return planned


class Factored(Initialised):
    """A delta with an update B A [out, in], which an initialisation may start. The method

        calls    self.begin(init, rank) at the end of its constructor, which takes `init: Start = "random"`
        writes   product() -> A, B        the update as it is now, its scaling in B
                 take(A, B)               sets its own tensors to the update scaling * B A
        uses     self.factors()           for the update, and self.rest(w) for w, wherever it changes weights

    Where an initialisation puts a part B_0 A_0 of W into the factors, W - B_0 A_0 is what stays frozen. The base is not
    written to: `factors` gives [A; A_0] and [B, -B_0], and `rest` gives W - B_0 A_0. A_0 and B_0 are buffers, saved
    with the adapter, for what they were made from (gradients, activations) need not be at hand when it is loaded.
    """

    scaling: float
    A0: Tensor | None  # [rank, in]
    B0: Tensor | None  # [out, rank], negated

    def __init__(self, site, shared=None):
        super().__init__(site, shared)
        self.register_buffer("A0", None)
        self.register_buffer("B0", None)

    @torch.no_grad()
    def begin(self, init: str, rank: int) -> None:
        """Start as `init` says; a delta whose values come from a file only gets the places for them."""
        how = initialisation(init)
        if how is None:
            return
        if self.site.kind not in how.hosts:
            raise GraftError(
                f"the initialisation {how.name} is for {', '.join(how.hosts)}; {self.site.path} is a {self.site.kind}"
            )
        if self.site.saved is None:
            self.take(*how.factors(self.site, rank, self.scaling))
        if how.taken_off:
            A, B = self.product()
            self.A0, self.B0 = A.clone(), -B

    def product(self) -> tuple[Tensor, Tensor]:
        """A [k, in] and B [out, k] of the update B A as it is now."""
        raise NotImplementedError

    def take(self, A: Tensor, B: Tensor) -> None:
        """Set the own tensors so that the update is scaling * B A."""
        raise NotImplementedError

    def factors(self):
        A, B = self.product()
        return (A, B) if self.A0 is None or self.B0 is None else (torch.cat([A, self.A0]), torch.cat([B, self.B0], 1))

    @property
    def scales_later(self) -> bool:
        """Whether `act` scales the features: with gradients, scaling B would keep one more [out, k] for backward."""
        return torch.is_grad_enabled() and self.A0 is None

    @torch.no_grad()
    def row_norms(self, w: Tensor) -> Tensor:
        """[out], the norms of the rows of w + B A, without B A [out, in].

        ||w + b A||^2 = ||w||^2 + 2 <w A^T, b> + b (A A^T) b^T for each row w and b.
        """
        to = torch.promote_types(w.dtype, torch.float32)
        A, B = (t.to(to) for t in self.factors())
        cross = 2 * F.linear(w, A.to(w.dtype)) + B @ (A @ A.T)
        square = torch.linalg.vector_norm(w, dim=1, dtype=to).square()
        return (square + (cross * B).sum(1)).clamp(min=torch.finfo(to).tiny).sqrt()

    def rest(self, w: Tensor) -> Tensor:
        """What stays frozen of w [out, in]."""
        return w if self.A0 is None or self.B0 is None else w + self.B0 @ self.A0

    def absorbed(self) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """Hyperparameters and tensors of the same delta with nothing taken off W, or None if nothing is."""
        if self.A0 is not None:
            raise GraftError(
                f"{self.name} at {self.site.path} started from a part of the base, for which only graft's own "
                f"format has a place: graft.convert makes a LoRA of it"
            )
