"""What runs at one host when the rows of a batch are served by different deltas.

Rows that want chains of a like kind make up a part of the batch:

    additive   W + B A:  y_i = f(x_i) + (x_i A_i^T) B_i^T, with the A_i, B_i padded to one rank: two batched products
    family     deltas of one method with equal settings and shapes: what they prepared is stacked, and `act` runs once
               for all rows: on `Rows` (rowwise.py), or in vmap where it does more, or where gradients are wanted
    alone      every other chain runs on its rows

Prompts and changes of the attention product stack themselves (`Delta.stack`). What is stacked is kept: of frozen
adapters for as long as the route is open, of others until a tensor of theirs changes. Where gradients are wanted it is
stacked anew each time.

A batch of n k rows is seen as [n, k, ...], row i being k neighbours: beams, or tokens where the host
gets [n k, features].
"""

import functools
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import vmap
from torch.nn.utils.rnn import pad_sequence

from ..core.delta import Delta, Edit, first_input
from ..core.errors import GraftError
from ..core.host import Adapted, Host, Link, own_function
from ..core.sites.linear import LinearSite
from ..core.stacked import neighbours
from .rowwise import Rows, Unsupported

Chain = tuple[Delta, ...]
Some = Callable[[list[int]], AbstractContextManager]
Seen = list[tuple[Tensor | None, ...]]  # what the edits of a chain see of a host's arguments


def rows_at(host: Adapted, place: str, rows: list[Chain], whole: list, some: Some) -> Callable:
    """The function that serves row i of a batch by the deltas `rows[i]`, the first one innermost, at a place of a host.

    `some(numbers)` is a context in which a batch consists of these rows only, `whole` what tells rows apart anywhere.
    """
    site = host.site
    inner = Host(site, site.plain if place == "product" else own_function(host))
    alike = len({*whole}) == 1 or not any(d.stacks_itself for d in rows[0])
    if len({*rows}) == 1 and alike:
        return functools.reduce(Link, rows[0], inner)
    if re.search(r"(^|\.)experts?\.", site.path):
        raise GraftError(
            f"{site.path} is an expert, which gets tokens of several rows at once: it cannot serve row by row"
        )
    if any(d.stacks_itself for chain in rows for d in chain):
        return _together(inner, rows, whole, some)
    return (_Tensors if isinstance(site, LinearSite) else _Modules)(inner, rows, some)


class _Kept:
    """What was made from the tensors of deltas: of frozen ones as they were at first, of others as they are now."""

    def __init__(self, sources: list[nn.Module]):
        self.sources = [d for m in dict.fromkeys(sources) for d in (m._parameters, m._buffers) if d]
        self.followed: list[dict[str, Any]] = []
        self.value: Any = None

    def __call__(self, make: Callable, *how: Any) -> Any:
        if torch.is_grad_enabled():
            return make(*how)
        if self.value is None or self.value[0] != how or self.value[1] != self.state():
            self.followed = [d for d in self.sources if any(t is not None and t.requires_grad for t in d.values())]
            kind = next((t.device.type for d in self.sources for t in d.values() if t is not None), "cpu")
            with torch.autocast(kind, enabled=False):  # as `Delta.prepared`
                self.value = how, self.state(), make(*how)
        return self.value[2]

    def state(self) -> list[tuple[int, int]]:
        return [(t.data_ptr(), t._version) for d in self.followed for t in d.values() if t is not None]


# Prompts and changes of the attention product


def _together(inner: Any, rows: list[Chain], whole: list, some: Some) -> Callable:
    """One link for each method at each depth of the chains; rows of other methods pass through it."""
    for depth in range(max(map(len, rows))):
        at = [row[depth] if depth < len(row) else None for row in rows]
        for method in dict.fromkeys(type(d) for d in at if d is not None):
            if not method.stacks_itself:
                raise GraftError(
                    f"{method.name} at {inner.site.path or 'the model'} cannot share a batch with prompts there"
                )
            inner = _Stacked(inner, [d if type(d) is method else None for d in at], whole, some)
    return inner


class _Stacked:
    def __init__(self, inner: Any, deltas: list[Any], whole: list, some: Some):
        self.inner, self.deltas, self.whole, self.some, self.site = inner, deltas, whole, some, inner.site
        self.one = next(d for d in deltas if d is not None)
        self.kept = _Kept([s for d in dict.fromkeys(deltas) if d is not None for s in d.sources()])

    def __call__(self, *args, **kwargs):
        return self.one.act_stacked(self.inner, self.kept(self.make), *args, **kwargs)

    def make(self):
        made: dict[Any, Any] = {}
        for i, kind in enumerate(self.whole):
            if kind not in made:  # LLaMA-Adapter's keys come out of projections which may have deltas of the row, too
                with self.some([i]):
                    made[kind] = self.deltas[i] and self.deltas[i].prepare(self.inner)
        return self.one.stack([made[kind] for kind in self.whole])


# Other hosts

Build = Callable[[dict], tuple[list, dict]]  # further arguments of a call, by position or name -> all of them


class _Numbers(list):
    """Numbers of rows, and how to take them out of a tensor of `count` rows, each of k neighbours."""

    def __init__(self, rows: list[int], count: int):
        super().__init__(rows)
        self.all, self.at = rows == list(range(count)), torch.tensor(rows, dtype=torch.long)

    def __call__(self, x: Tensor, k: int) -> Tensor:
        if self.all:
            return x
        self.at = self.at.to(x.device)
        return x.index_select(0, self.at) if k == 1 else _split(x, k).index_select(0, self.at).flatten(0, 1)


def _split(x: Tensor, k: int) -> Tensor:
    """[n k, ...] as [n, k, ...]."""
    return x.unflatten(0, (-1, k))


class _Asked(Exception):
    """What a chain wants its host to be run on."""

    def __init__(self, x: Tensor):
        self.x = x


class _Other:
    """A host with another function."""

    def __init__(self, host: Any, call: Callable):
        self.host, self.call = host, call

    def __call__(self, *args, **kwargs):
        return self.call(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.host, name)


def _given(inner: Any, x: Any, y: Any) -> Any:
    """A function of which one value is known already: y at x."""
    return _Other(inner, lambda z, *more, **named: y if z is x else inner(z, *more, **named))


def _asks(host: Host) -> Any:
    def call(x):
        raise _Asked(x)

    return _Other(host, call)


def _told(host: Host, y: Tensor) -> Any:
    """A host that has been run on what its chain asks for first."""
    answers = [y]
    return _Other(host, lambda x: answers.pop() if answers else host(x))


def _of_rows(host: Any) -> Any:
    """A host's function for all rows at once, as `act` sees that of one row."""
    return _Other(host, lambda x: Rows(host(x.all.flatten(0, 1)).unflatten(0, (len(x.all), -1))))


class _Part:
    """Some rows: those of the base, without a chain, or those of one chain."""

    def __init__(self, host: Host, rows: list[int], count: int, chains: list[Chain]):
        self.host, self.rows, self.chains = host, _Numbers(rows, count), chains
        self.deltas: list[Any] = list(dict.fromkeys(d for chain in chains for d in chain))
        self.outside = all(d.passes_x for d in self.deltas)  # f(x) is all that it needs of the host's function
        self.kept = _Kept([s for d in self.deltas for s in d.sources()] + host.sources())

    def outer(self, x: Tensor, y: Tensor, seen: Seen, own: bool) -> Tensor:
        """The outputs [m k, ...] for x [m k, ...] and what the host gives for it, y; `own`: y may be written to."""
        for i, delta in enumerate(self.chains[0]):
            if isinstance(delta, Edit):
                y = delta.edit(y, x, *seen[i], *delta.prepared(self.host, y.dtype))
            else:
                y = delta(_given(functools.reduce(Link, self.chains[0][:i], self.host), x, y), x)
        return y

    def whole(self, host: Any, x: Tensor, more: dict[Any, Tensor], build: Build) -> Tensor:
        """The outputs [m k, ...] for x and more arguments [m k, ...]."""
        args, kwargs = build(more)
        return _first(functools.reduce(Link, self.chains[0], host)(x, *args, **kwargs))


class _Additive(_Part):
    def outer(self, x, y, seen, own):
        A, B = self.kept(self.make, x.dtype)
        n = len(self.rows)
        same = x.dim() == 3 and len(x) == n
        h = torch.bmm(x if same else x.reshape(n, -1, x.shape[-1]), A)
        if own and y.is_contiguous() and y.dtype == h.dtype == B.dtype:
            (y if same else y.view(n, -1, y.shape[-1])).baddbmm_(h, B)
            return y
        return torch.baddbmm(y.reshape(n, -1, y.shape[-1]), h, B).view(y.shape)

    def make(self, dtype):
        """A [m, in, rank] and B [m, rank, out], zeros beyond the rank of a row."""
        site, kinds = self.host.site, list(dict.fromkeys(self.chains))
        none = site.where().new_empty(0, dtype=dtype)
        A, B = [], []
        for chain in kinds:
            pairs: list[Any] = [d.factors() for d in chain]
            A.append(torch.cat([a.to(dtype) for a, _ in pairs]) if pairs else none.view(0, site.d_in))
            B.append(torch.cat([b.T.to(dtype) for _, b in pairs]) if pairs else none.view(0, site.d_out))
        A, B = pad_sequence(A, batch_first=True), pad_sequence(B, batch_first=True)
        if len(kinds) == len(self.rows):
            return A.mT, B
        number = {chain: i for i, chain in enumerate(kinds)}
        at = torch.tensor([number[chain] for chain in self.chains], device=A.device)
        return A[at].mT, B[at]


class _Family(_Part):
    def __init__(self, host: Host, rows: list[int], count: int, chains: list[Chain]):
        super().__init__(host, rows, count, chains)
        self.one: Any = chains[0][0]
        self.plain = host.site.kind in ("linear", "module")  # whose features lie along the last axis: not a convolution

    def outer(self, x, y, seen, own):
        def row(x, y, seen, *prepared):
            if isinstance(self.one, Edit):
                return self.one.edit(y, x, *seen, *prepared)
            return self.one.act(_given(inner(x), x, y), x, *prepared)

        inner = lambda x: _of_rows(self.host) if isinstance(x, Rows) else self.host
        return self.each(row, x, y, seen[0])

    def whole(self, host, x, more, build):
        inner = lambda x: _of_rows(host) if isinstance(x, Rows) else self.host
        return self.each(lambda x, *prepared: self.one.act(inner(x), x, *prepared), x)

    def each(self, row: Callable, *given: Any) -> Tensor:
        """`row` for every row, with what is given [m k, ...] and what its delta has prepared."""
        n = len(self.rows)
        split = lambda t: t.unflatten(0, (n, -1)) if isinstance(t, Tensor) else t and tuple(map(split, t))
        given = tuple(map(split, given))
        tensors, dims = self.kept(self.make)
        if self.plain and not torch.is_grad_enabled():
            held = lambda t: Rows(t) if isinstance(t, Tensor) else t and tuple(map(held, t))
            prepared = (t if d is None else Rows(t) for t, d in zip(tensors, dims))
            try:
                return row(*map(held, given), *prepared).all.flatten(0, 1)
            except Unsupported:
                self.plain = False
        out = vmap(row, (*[0] * len(given), *dims), randomness="different")(*given, *tensors)
        return out.flatten(0, 1)

    def make(self):
        """What the deltas of the rows prepared, stacked, and along which axis; as it is where they all share it."""
        given: dict[Delta, tuple] = {d: d.prepare(self.host) for d in self.deltas}
        rows = zip(*(given[chain[0]] for chain in self.chains))
        stacked = [(ts[0], None) if all(_same(t, ts[0]) for t in ts) else (torch.stack(ts), 0) for ts in rows]
        return [t for t, _ in stacked], [d for _, d in stacked]


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
        self.given = [_Numbers([place[i] for i in p.rows], len(place)) if p.outside else None for p in self.parts]
        order = [i for p in self.parts for i in p.rows]
        self.back = _Numbers(sorted(range(len(order)), key=order.__getitem__), len(order))

    def look(self, args: tuple, kwargs: dict[str, Any]) -> list[Seen]:
        """What the edits of each part see of the arguments before the host runs, for all rows [n k, ...]."""
        return [[d.look(args, kwargs) if isinstance(d, Edit) else () for d in p.chains[0]] for p in self.parts]

    def parted(
        self, x: Tensor, k: int, y: Tensor | None, looked: list[Seen], wholes: Iterator[Tensor], new: bool = False
    ) -> Tensor:
        """The outputs for x [n k, ...] where the host gives y [rows of the base k, ...].

        `wholes` are those of the parts that need more of the host than y; `new`: y may be written to.
        """
        outs, free = [], not torch.is_grad_enabled()  # what autograd may keep is not written to
        for part, given, seen in zip(self.parts, self.given, looked):
            if given is None:
                outs.append(next(wholes))
            elif y is not None:
                mine = [tuple(t if t is None else part.rows(t, k) for t in ts) for ts in seen]
                outs.append(part.outer(part.rows(x, k), given(y, k), mine, free and (new or not given.all)))
        if len(outs) == 1:
            return outs[0]
        wide = max(out.shape[-1] for out in outs)
        outs = [
            out if out.shape[-1] == wide else F.pad(out, (0, wide - out.shape[-1]), value=-torch.inf) for out in outs
        ]
        return self.back(torch.cat(outs), k)


class _Tensors(_Hosts):
    """A host of one tensor: a linear map, a convolution, an embedding, a norm."""

    def __init__(self, host: Host, rows: list[Chain], some: Some):
        super().__init__(host, rows, some)
        # What nn.Linear gives is new and nobody else's; other parts may read it.
        self.new = len(self.parts) == 1 and getattr(host.call, "__func__", None) is nn.Linear.forward
        self.wholes = [p for p in self.parts if not p.outside]
        self.joins = len(self.parts) > 1 and host.site.kind == "linear"

    def __call__(self, x):
        if len(x) == 1 and x.dim() > 1:
            x = x.expand(self.count, *x.shape[1:])  # positions, which the rows have in common
        k = neighbours(len(x), self.count, self.path)
        looked = self.look((x,), {})
        own = self.base.rows(x, k) if self.base.rows else None
        y, wholes = None, iter(())
        if self.wholes:
            y, wholes = self.run(own, [part.rows(x, k) for part in self.wholes])
        elif own is not None:
            y = self.host(own)
        return self.parted(x, k, y, looked, wholes, self.new)

    def run(self, own: Tensor | None, xs: list[Tensor]) -> tuple[Tensor | None, Iterator[Tensor]]:
        """What the host gives for the rows of the base, and the outputs of the parts which turn its inputs.

        A matrix is read once for all of them in inference, where chains may be run twice: up to the host, and again
        with what it gave.
        """
        build = lambda more: ([], {})
        outs: list[Any] = [None] * len(xs)
        asked: dict[int, Tensor] = {} if own is None else {-1: own}
        if self.joins and not torch.is_grad_enabled():
            for i, (part, x) in enumerate(zip(self.wholes, xs)):
                try:
                    outs[i] = part.whole(_asks(self.host), x, {}, build)
                except _Asked as question:
                    asked[i] = question.x
        answers = {}
        if len({t.shape[1:] for t in asked.values()}) == 1 == len({t.dtype for t in asked.values()}):
            joined = self.host(torch.cat([*asked.values()]) if len(asked) > 1 else next(iter(asked.values())))
            answers = dict(zip(asked, joined.split([*map(len, asked.values())])))
        elif own is not None:
            answers = {-1: self.host(own)}
        for i, (part, x) in enumerate(zip(self.wholes, xs)):
            if outs[i] is None:
                outs[i] = part.whole(_told(self.host, answers[i]) if i in answers else self.host, x, {}, build)
        return answers.get(-1), iter(outs)


class _Modules(_Hosts):
    """Any other module: it runs once for all rows that need it, whatever its arguments are."""

    def __call__(self, *args, **kwargs):
        x = first_input(args, kwargs)
        k = neighbours(len(x), self.count, self.path)
        looked, rest = self.look(args, kwargs), args[1:]
        kwargs = {name: value for name, value in kwargs.items() if value is not x}
        given = dict(enumerate(rest)) | kwargs
        more = {key: t for key, t in given.items() if _is_batch(t, len(x))}
        if not all(p.outside for p in self.parts) and any(hasattr(v, "get_seq_length") for v in given.values()):
            raise GraftError(
                f"{self.path} runs apart for some of the rows, and its keys and values are kept for all of them "
                f"together: pass use_cache=False"
            )

        def build(more):
            now = given | more
            return [now[i] for i in range(len(rest))], {key: v for key, v in now.items() if key in kwargs}

        out = self.host(x, *rest, **kwargs) if self.base.rows else None
        y = None if out is None else self.base.rows(_first(out), k)

        def wholes():
            for part in self.parts:
                if not part.outside:
                    with self.some(part.rows):
                        yield part.whole(
                            self.host, part.rows(x, k), {key: part.rows(t, k) for key, t in more.items()}, build
                        )

        first = self.parted(x, k, y, looked, wholes())
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
    return delta.by_factors and not (delta.training and getattr(delta, "dropout", 0))


def _is_stackable(site: Any, delta: Delta) -> bool:
    cls = type(delta)
    if isinstance(delta, Edit):
        return delta.passes_x
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
