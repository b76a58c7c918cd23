"""What runs at one host when the rows of a batch are served by different deltas.

Rows that want chains of a like kind make up a part of the batch:

    additive   W + B A:  y_i = f(x_i) + (x_i A_i^T) B_i^T, with the A_i, B_i padded to one rank: two batched products
    family     deltas of one method with equal settings and shapes: what they prepared is stacked, `act` runs in vmap
    alone      every other chain runs on its rows

Prompts and changes of the attention product stack themselves (`Delta.stack`). What is stacked is kept while no tensor
it came from changes; where gradients are wanted it is stacked anew each time.

A batch of n k rows is seen as [n, k, ...], row i being k neighbours: beams, or tokens where the host
gets [n k, features].
"""

import functools
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.utils.rnn import pad_sequence

from ..core.delta import Adapted, Delta, Edit, Host, Link, own_function, tensor_state
from ..core.errors import GraftError
from ..core.site import LinearSite
from ..core.stacked import neighbours

Chain = tuple[Delta, ...]
Some = Callable[[list[int]], AbstractContextManager]
Seen = list[tuple[Tensor | None, ...]]  # what the edits of a chain see of a host's arguments
BROAD = 4  # factors of more values than this many times the parameters they come from are not formed row by row


def rows_at(host: Adapted, place: str, rows: list[Chain], some: Some) -> Callable:
    """The function that serves row i of a batch by the deltas `rows[i]`, the first one innermost, at a place of a host.

    `some(numbers)` is a context in which a batch consists of these rows only.
    """
    site = host.site
    inner = Host(site, site.plain if place == "product" else own_function(host))
    if len(set(rows)) == 1:
        return functools.reduce(Link, rows[0], inner)
    if re.search(r"(^|\.)experts?\.", site.path):
        raise GraftError(
            f"{site.path} is an expert, which gets tokens of several rows at once: it cannot serve row by row"
        )
    if any(d.stacks_itself for chain in rows for d in chain):
        return _together(inner, rows, some)
    return (_Tensors if isinstance(site, LinearSite) else _Modules)(inner, rows, some)


class _Kept:
    """What was made from the tensors of some deltas, until one of them changes."""

    def __init__(self, sources: list[dict[str, Any]]):
        self.sources, self.value = sources, None

    def __call__(self, make: Callable, *how: Any) -> Any:
        if torch.is_grad_enabled():
            return make(*how)
        state = [*how, *(tensor_state(self.sources, trained=True) or ())]
        if self.value is None or self.value[0] != state:
            self.value = state, make(*how)
        return self.value[1]


# Prompts and changes of the attention product


def _together(inner: Any, rows: list[Chain], some: Some) -> Callable:
    """One link for each method at each depth of the chains; rows of other methods pass through it."""
    for depth in range(max(map(len, rows))):
        at = [row[depth] if depth < len(row) else None for row in rows]
        for method in dict.fromkeys(type(d) for d in at if d is not None):
            if not method.stacks_itself:
                raise GraftError(
                    f"{method.name} at {inner.site.path or 'the model'} cannot share a batch with prompts there"
                )
            inner = _Stacked(inner, [d if type(d) is method else None for d in at], some)
    return inner


class _Stacked:
    def __init__(self, inner: Any, deltas: list[Any], some: Some):
        self.inner, self.deltas, self.some, self.site = inner, deltas, some, inner.site
        self.one = next(d for d in deltas if d is not None)
        self.kept = _Kept([s for d in dict.fromkeys(deltas) if d is not None for s in d.sources()])

    def __call__(self, *args, **kwargs):
        return self.one.act_stacked(self.inner, self.kept(self.make), *args, **kwargs)

    def make(self):
        prepared = []
        for i, delta in enumerate(self.deltas):
            with self.some([i]):  # LLaMA-Adapter's keys come out of projections which may have deltas too
                prepared.append(delta and delta.prepare(self.inner))
        return self.one.stack(prepared)


# Other hosts

Build = Callable[[dict], tuple[list, dict]]  # further arguments of a call, by position or name -> all of them


class _Rows(list):
    """Numbers of rows, and how to take them out of a tensor of `count` rows."""

    def __init__(self, rows: list[int], count: int):
        super().__init__(rows)
        self.all, self.at = rows == list(range(count)), torch.tensor(rows, dtype=torch.long)

    def __call__(self, x: Tensor) -> Tensor:
        if self.all:
            return x
        self.at = self.at.to(x.device)
        return x.index_select(0, self.at)


class _Given:
    """A function of which one value is known already: y at x."""

    def __init__(self, inner: Any, x: Any, y: Any):
        self.inner, self.x, self.y = inner, x, y

    def __call__(self, x, *args, **kwargs):
        return self.y if x is self.x else self.inner(x, *args, **kwargs)

    weight = property(lambda self: self.inner.weight)
    bias = property(lambda self: self.inner.bias)

    def sources(self):
        return self.inner.sources()


class _Part:
    """Some rows: those of the base, without a chain, or those of one chain."""

    def __init__(self, host: Host, rows: list[int], count: int, chains: list[Chain]):
        self.host, self.rows, self.chains = host, _Rows(rows, count), chains
        self.deltas: list[Any] = list(dict.fromkeys(d for chain in chains for d in chain))
        self.outside = all(d.passes_x for d in self.deltas)  # f(x) is all that it needs of the host's function
        self.kept = _Kept([s for d in self.deltas for s in d.sources()] + host.sources())

    def outer(self, x: Tensor, y: Tensor, seen: Seen) -> Tensor:
        """The outputs [m, k, ...] for x [m, k, ...] and what the host gives for it, y."""
        k, x, y = x.shape[1], x.flatten(0, 1), y.flatten(0, 1)
        for i, delta in enumerate(self.chains[0]):
            if isinstance(delta, Edit):
                y = delta.edit(y, x, *(t if t is None else t.flatten(0, 1) for t in seen[i]))
            else:
                y = delta(_Given(functools.reduce(Link, self.chains[0][:i], self.host), x, y), x)
        return y.unflatten(0, (-1, k))

    def whole(self, x: Tensor, more: dict[Any, Tensor], build: Build) -> Tensor:
        """The outputs [m, k, ...] for x and more arguments [m, k, ...]."""
        k = x.shape[1]
        args, kwargs = build({key: t.flatten(0, 1) for key, t in more.items()})
        chain = functools.reduce(Link, self.chains[0], self.host)
        return _first(chain(x.flatten(0, 1), *args, **kwargs)).unflatten(0, (-1, k))


class _Additive(_Part):
    def outer(self, x, y, seen):
        A, B = self.kept(self.make, x.dtype)
        h = torch.bmm(x.reshape(len(x), -1, x.shape[-1]), A.mT)
        return torch.baddbmm(y.reshape(len(y), -1, y.shape[-1]), h, B).view(y.shape)

    def make(self, dtype):
        """A [m, rank, in] and B [m, rank, out], zeros beyond the rank of a row."""
        site, kinds = self.host.site, list(dict.fromkeys(self.chains))
        none = site.where().new_empty(0, dtype=dtype)
        A, B = [], []
        for chain in kinds:
            pairs: list[Any] = [d.factors() for d in chain]
            A.append(torch.cat([a.to(dtype) for a, _ in pairs]) if pairs else none.view(0, site.d_in))
            B.append(torch.cat([b.T.to(dtype) for _, b in pairs]) if pairs else none.view(0, site.d_out))
        A, B = pad_sequence(A, batch_first=True), pad_sequence(B, batch_first=True)
        if len(kinds) == len(self.rows):
            return A, B
        number = {chain: i for i, chain in enumerate(kinds)}
        at = torch.tensor([number[chain] for chain in self.chains], device=A.device)
        return A[at], B[at]


class _Family(_Part):
    def outer(self, x, y, seen):
        tensors, dims = self.kept(self.make)
        one = self.chains[0][0]

        def row(x, y, seen, *prepared):
            if isinstance(one, Edit):
                return functional_call(self.edit, dict(zip(self.names, prepared)), (y, x, *seen))
            return one.act(_Given(self.host, x, y), x, *prepared)

        return vmap(row, (0, 0, 0, *dims), randomness="different")(x, y, seen[0], *tensors)

    def whole(self, x, more, build):
        tensors, dims = self.kept(self.make)
        one = self.chains[0][0]

        def row(x, more, *prepared):
            if isinstance(one, Edit):
                args, kwargs = build(more)
                named = {name.removeprefix("one."): t for name, t in zip(self.names, prepared)}
                return _first(functional_call(one, named, (self.host, x, *args), kwargs))
            return one.act(self.host, x, *prepared)

        return vmap(row, (0, 0, *dims), randomness="different")(x, more, *tensors)

    def make(self):
        """What the deltas of the rows prepared, stacked, and along which axis; as it is where they all share it."""
        given = {d: self._of(d) for d in self.deltas}
        rows = zip(*(given[chain[0]] for chain in self.chains))
        stacked = [(ts[0], None) if all(_same(t, ts[0]) for t in ts) else (torch.stack(ts), 0) for ts in rows]
        return [t for t, _ in stacked], [d for _, d in stacked]

    def _of(self, delta: Delta) -> tuple:
        if not isinstance(delta, Edit):
            return delta.prepare(self.host)
        named = dict(delta.named_parameters()) | dict(delta.named_buffers())
        self.edit, self.names = _Edit(delta), tuple(f"one.{name}" for name in named)
        return tuple(named.values())


class _Edit(nn.Module):
    """The `edit` of a delta as a module's forward, which `functional_call` runs with other tensors."""

    def __init__(self, one: Edit):
        super().__init__()
        self.one = one

    def forward(self, *args):
        return self.one.edit(*args)


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is b or a is None or b is None:
        return a is b
    return (a.data_ptr(), a.shape, a.stride(), a.dtype) == (b.data_ptr(), b.shape, b.stride(), b.dtype)


def _first(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


class _Hosts:
    """y_i = chain_i(x_i) for the rows i of a batch."""

    def __init__(self, host: Host, rows: list[Chain], some: Some):
        self.host, self.count, self.path, self.some = host, len(rows), host.site.path, some
        groups: dict[Any, list[int]] = {}
        for i, chain in enumerate(rows):
            groups.setdefault(_group(host.site, chain), []).append(i)
        if () in groups and _ADDITIVE in groups:  # the base's rows have rank 0
            groups[_ADDITIVE] = sorted(groups.pop(()) + groups[_ADDITIVE])
        self.parts: list[_Part] = []
        for key, at in groups.items():
            chains = [rows[i] for i in at]
            cls = _Part if len({*chains}) == 1 else _Additive if key == _ADDITIVE else _Family
            self.parts.append(cls(host, at, len(rows), chains))
        self.base = _Part(host, sorted(i for p in self.parts if p.outside for i in p.rows), len(rows), [()])
        place = {row: i for i, row in enumerate(self.base.rows)}
        self.given = [_Rows([place[i] for i in p.rows], len(place)) if p.outside else None for p in self.parts]
        order = [i for p in self.parts for i in p.rows]
        self.back = _Rows(sorted(range(len(order)), key=order.__getitem__), len(order))

    def look(self, args: tuple, kwargs: dict[str, Any], k: int) -> list[Seen]:
        """What the edits of each part see of the arguments before the host runs, for all rows [n, k, ...]."""
        split = lambda t: t if t is None else t.unflatten(0, (-1, k))
        return [
            [tuple(map(split, d.look(args, kwargs))) if isinstance(d, Edit) else () for d in p.chains[0]]
            for p in self.parts
        ]

    def parted(self, x: Tensor, y: Tensor | None, looked: list[Seen], more: dict[Any, Tensor], build: Build) -> Tensor:
        """The outputs for x and more arguments [n, k, ...] where the host gives y [rows of the base, k, ...]."""
        outs = []
        for part, given, seen in zip(self.parts, self.given, looked):
            if given is None:
                with nullcontext() if isinstance(self, _Tensors) else self.some(part.rows):
                    outs.append(part.whole(part.rows(x), {key: part.rows(t) for key, t in more.items()}, build))
            elif y is not None:
                own = [tuple(t if t is None else part.rows(t) for t in ts) for ts in seen]
                outs.append(part.outer(part.rows(x), given(y), own))
        wide = max(out.shape[-1] for out in outs)
        outs = [
            out if out.shape[-1] == wide else F.pad(out, (0, wide - out.shape[-1]), value=-torch.inf) for out in outs
        ]
        return self.back(outs[0] if len(outs) == 1 else torch.cat(outs)).flatten(0, 1)


class _Tensors(_Hosts):
    """A host of one tensor: a linear map, a convolution, an embedding, a norm."""

    def __call__(self, x):
        if len(x) == 1 and x.dim() > 1:
            x = x.expand(self.count, *x.shape[1:])  # positions, which the rows have in common
        k = neighbours(len(x), self.count, self.path)
        looked, y = self.look((x,), {}, k), None
        x = x.unflatten(0, (self.count, k))
        if self.base.rows:
            y = self.host(self.base.rows(x).flatten(0, 1)).unflatten(0, (-1, k))
        return self.parted(x, y, looked, {}, lambda more: ([], {}))


class _Modules(_Hosts):
    """Any other module: it runs once for all rows that need it, whatever its arguments are."""

    def __call__(self, *args, **kwargs):
        k = neighbours(len(args[0] if args else kwargs["hidden_states"]), self.count, self.path)
        looked = self.look(args, kwargs, k)
        x, *rest = args if args else (kwargs.pop("hidden_states"),)
        given = dict(enumerate(rest)) | kwargs
        more = {key: t.unflatten(0, (-1, k)) for key, t in given.items() if _is_batch(t, len(x))}

        def build(more):
            now = given | more
            return [now[i] for i in range(len(rest))], {key: v for key, v in now.items() if key in kwargs}

        out = self.host(x, *rest, **kwargs) if self.base.rows else None
        y = None if out is None else self.base.rows(_first(out).unflatten(0, (-1, k)))
        first = self.parted(x.unflatten(0, (-1, k)), y, looked, more, build)
        return (first, *out[1:]) if isinstance(out, tuple) else first


def _is_batch(t: Any, size: int) -> bool:
    return isinstance(t, Tensor) and t.dim() > 0 and len(t) == size


_ADDITIVE = ("additive",)


def _group(site: Any, chain: Chain) -> tuple:
    """What rows must have in common to be computed together."""
    if site.kind == "linear" and all(map(_is_additive, chain)):
        return _ADDITIVE if chain else ()
    if len(chain) != 1 or site.kind == "embedding" or not _is_stackable(site, chain[0]):
        return chain
    tensors = (*chain[0].named_parameters(), *chain[0].named_buffers())
    return (type(chain[0]), id(chain[0].shared), _settings(chain[0]), *((n, t.shape, t.dtype) for n, t in tensors))


def _is_additive(delta: Any) -> bool:
    if delta.training and getattr(delta, "dropout", 0):
        return False
    pair = delta.factors()
    own = sum(p.numel() for p in delta.parameters())
    return pair is not None and sum(t.numel() for t in pair) <= BROAD * own


def _is_stackable(site: Any, delta: Delta) -> bool:
    if isinstance(delta, Edit):  # inside vmap no host of its own may run
        return delta.passes_x or not any(isinstance(m, Adapted) for m in site.module.modules() if m is not site.module)
    cls = type(delta)
    small = site.kind == "norm" and cls.forward is Delta.forward  # W' is a vector
    return small or cls.act is not Delta.act


def _settings(delta: nn.Module) -> tuple:
    """What a delta holds beside tensors: deltas that differ in it cannot run as one."""
    plain = (bool, int, float, str, type(None), tuple)
    known = ("site", "shared")
    return tuple(
        (path, name, value if isinstance(value, plain) else id(value))
        for path, m in delta.named_modules()
        for name, value in m.__dict__.items()
        if not name.startswith("_") and name not in known
    )
