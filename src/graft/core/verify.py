"""Whether deltas are reached: what one forward does with their hosts and with the weights of these.

A delta changes what the forward of its host computes. Whoever reads the host's weight in another way does not see it:
a fused kernel, F.linear(x, self.proj.weight) in the module above, an output head tied to an adapted embedding.
"""

import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from . import host as hosting
from .adapter import Adapter
from .card import class_name
from .delta import Delta
from .errors import GraftError
from .host import Adapted, base_modules
from .registry import adapters, unwrapped

READ = ("linear", "conv", "embedding", "norm")  # kinds of hosts whose own tensors a delta changes
OUTSIDE = "code outside the model"


@dataclass(frozen=True)
class Reach:
    """What became of one delta in a forward.

    calls     how often its host ran (for deltas of the attention product: the product)
    past      modules that read the host's weight past its forward, where the delta has no effect
    tied      modules that own the same weight and ran with it as it is in the base
    gradient  whether a gradient other than zero reaches the delta; None where that was not asked for, or it rests
    """

    adapter: str
    path: str
    calls: int
    past: tuple[str, ...] = ()
    tied: tuple[str, ...] = ()
    gradient: bool | None = None

    @property
    def trouble(self) -> str | None:
        """Why the delta is missed, or None."""
        if self.past:
            also = "also " if self.calls else ""
            return f"its weight is {also}read past its forward, by {' and '.join(self.past)}"
        if not self.calls:
            return "its forward did not run"
        if self.gradient is False:
            return "no gradient reaches it: what it computes does not count in the output"
        return None


@dataclass(frozen=True, repr=False)
class Verification:
    """What `verify` found: `deltas` holds all of them, `missed` those that the forward does not use as it should."""

    deltas: tuple[Reach, ...]

    @property
    def missed(self) -> tuple[Reach, ...]:
        return tuple(d for d in self.deltas if d.trouble)

    @property
    def tied(self) -> tuple[Reach, ...]:
        """Those whose weight another module shares, which goes on with the base's."""
        return tuple(d for d in self.deltas if d.tied)

    def check(self) -> None:
        """GraftError if a delta is missed."""
        if missed := self.missed:
            named = "; ".join(f"{_at(d)}: {d.trouble}" for d in missed[:3]) + "; ..." * (len(missed) > 3)
            raise GraftError(
                f"{len(missed)} of {len(self.deltas)} deltas are missed: {named}. Choose other targets, such as the "
                f"module above, or, where a forward did not run, a batch that needs it"
            )

    def __repr__(self):
        lines = [f"{len(self.deltas) - len(self.missed)} of {len(self.deltas)} deltas reached"]
        for name in dict.fromkeys(d.adapter for d in self.deltas):
            own = [d for d in self.deltas if d.adapter == name]
            calls = sorted({d.calls for d in own if d.calls})
            often = f", each {' or '.join('once' if n == 1 else f'{n} times' for n in calls)}" if calls else ""
            lines.append(f"  {name}: {sum(not d.trouble for d in own)} of {len(own)}{often}")
        lines += [f"missed: {_at(d)}: {d.trouble}" for d in self.missed]
        lines += [f"tied: {_at(d)}: {' and '.join(d.tied)} goes on with the weight as it is" for d in self.tied]
        return "\n".join(lines)


def verify(
    model: nn.Module,
    batch: Any,
    *,
    train: bool = False,
    run: Callable[[nn.Module, Any], Any] | None = None,
) -> Verification:
    """Run `model` once on `batch` and tell for every delta of the running adapters whether it was reached.

    batch  keywords of the model as a dict, its arguments as a tuple, or its only argument
    train  run in training mode with gradients, and tell which deltas get one; else in evaluation mode without. The
           two may differ: some modules of torch call a fused kernel in evaluation alone
    run    how to run the model, if not as model(**batch): a function (model, batch) -> output

    A delta is missed if its host did not run, if the host's weight was read past its forward, or (`train`) if no
    gradient reaches it. Reads are seen below autograd, in every operation of torch and of extensions registered with
    it; a compiled model runs as it would without compilation. Afterwards the model is as it was, and so are random
    numbers.
    """
    model = unwrapped(model)
    chain = {name: a for name, a in adapters(model).items() if a.active}
    if not chain:
        raise GraftError(f"{class_name(model)} runs no adapter: there is no delta to reach")
    first = next(iter(next(iter(chain.values())).deltas.values()))
    routed = hosting.routed is not None and hosting.routed(first.site.module, first.place) is not None
    if routed or (isinstance(batch, Mapping) and batch.get("adapters") is not None):
        raise GraftError(
            "verify runs the adapters that are active, not one for each row: leave adapters= and graft.route out, and "
            "activate those to verify"
        )
    # A frozen adapter too: what is asked is whether a gradient would get there.
    parameters = [p for a in chain.values() for p in a.parameters() if p.is_floating_point()] if train else []
    flags = [p.requires_grad for p in parameters]
    modes = {m: m.training for m in model.modules()}
    try:
        for p in parameters:
            p.requires_grad_(True)
        model.train(train)
        with (
            torch.random.fork_rng(),
            torch.set_grad_enabled(train),
            torch.compiler.set_stance("force_eager"),
            _watched(model, chain) as watch,
        ):
            out = (run or _run)(model, batch)
        grads = _gradients(out, parameters) if train else {}
    finally:
        for p, flag in zip(parameters, flags):
            p.requires_grad_(flag)
        for module, mode in modes.items():
            module.training = mode
    return Verification(
        tuple(
            Reach(
                name,
                path,
                watch.calls[delta.place, id(delta.site.module)],
                *watch.readers(delta),
                _gets(grads, a, delta) if train else None,
            )
            for name, a in chain.items()
            for path, delta in a.deltas.items()
        )
    )


def _at(reach: Reach) -> str:
    return f"{reach.adapter} at {reach.path or 'the model'}"


def _run(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


def _gradients(out: Any, parameters: list[nn.Parameter]) -> dict[nn.Parameter, bool]:
    """Which parameters get a gradient other than zero from the output, summed with random weights."""
    draw = torch.Generator().manual_seed(0)  # a plain sum of what a norm gives is constant
    total: Any = 0.0
    for t in _tensors(out):
        if t.requires_grad:
            total = total + (t * torch.rand(t.shape, generator=draw).to(t.device, t.dtype)).sum().float()
    if not isinstance(total, Tensor):
        return dict.fromkeys(parameters, False)
    grads = torch.autograd.grad(total, parameters, allow_unused=True)
    return {p: g is not None and bool(g.any()) for p, g in zip(parameters, grads)}


def _gets(grads: dict[nn.Parameter, bool], adapter: Adapter, delta: Delta) -> bool | None:
    """Whether one of a delta's tensors got a gradient, or of those it shares with others if it has none of its own."""
    if delta.resting:
        return None
    own = [*delta.parameters()] or ([] if adapter.shared is None else [*adapter.shared.parameters()])
    known = [grads[p] for p in own if p in grads]
    return any(known) if known else None


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping | tuple | list):
        for part in tree.values() if isinstance(tree, Mapping) else tree:
            yield from _tensors(part)


@contextmanager
def _watched(model: nn.Module, chain: dict[str, Adapter]) -> Iterator["_Watch"]:
    """Count the calls of the chains of deltas, and look out for who reads the hosts' tensors, for the duration."""
    watch = _Watch(model, [d for a in chain.values() for d in a.deltas.values()])
    kept = []
    try:
        for host in {id(d.site.module): d.site.module for a in chain.values() for d in a.deltas.values()}.values():
            for place, attribute in (("forward", "chain"), ("product", "product")):
                if own := host.__dict__.get(attribute):
                    kept.append((host, attribute, own))
                    host.__dict__[attribute] = _Counted(own, host, place, watch)
        with watch:
            yield watch
    finally:
        for host, attribute, own in kept:
            host.__dict__[attribute] = own


class _Counted:
    """The chain of a host, which tells a watch when it runs."""

    def __init__(self, chain: Any, host: Adapted, place: str, watch: "_Watch"):
        self.chain, self.key, self.watch = chain, (place, id(host)), watch

    def __call__(self, *args, **kwargs):
        self.watch.calls[self.key] += 1
        self.watch.running.append(self.key)
        try:
            return self.chain(*args, **kwargs)
        finally:
            self.watch.running.pop()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.chain, name)


class _Watch(TorchDispatchMode):
    """Sees every operation on the tensors of hosts, views of them included, and notes those outside of their chains."""

    def __init__(self, model: nn.Module, deltas: list[Delta]):
        super().__init__()
        self.paths = {id(m): path or "the model" for path, m in base_modules(model).items()}
        self.calls: Counter[tuple[str, int]] = Counter()
        self.running: list[tuple[str, int]] = []
        self.hosts: dict[int, list[tuple[int, int, int]]] = defaultdict(list)  # storage -> (begin, end, id of host)
        self.reads: dict[int, dict[str, bool]] = defaultdict(dict)  # id of host -> {reader: whether it owns the tensor}
        for host in {id(d.site.module): d.site.module for d in deltas if _changes_tensors(d)}.values():
            for t in host._parameters.values():
                if t is not None and (place := _place(t)):
                    self.hosts[place[0]].append((*place[1:], id(host)))

    def readers(self, delta: Delta) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Who read the tensors of a delta's host past its forward, and who did so with tensors of their own."""
        found = self.reads[id(delta.site.module)] if _changes_tensors(delta) else {}
        return tuple(p for p, own in found.items() if not own), tuple(p for p, own in found.items() if own)

    def _of(self, t: Tensor) -> set[int]:
        """The ids of the hosts to which (a part of) the tensor belongs."""
        place = _place(t)
        if place is None or place[0] not in self.hosts:
            return set()
        return {host for begin, end, host in self.hosts[place[0]] if begin < place[2] and place[1] < end}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        read = set().union(*map(self._of, _tensors((args, kwargs))))
        # A view reads nothing yet, and what only has the shape or the type of another tensor does not read it.
        name = getattr(func, "__name__", "").partition(".")[0]
        shapely = name.startswith("new_") or name.endswith("_like")
        uses = bool(read) and not shapely and not all(self._of(t) for t in _tensors(out))
        if uses and not any(("forward", host) in self.running for host in read):
            self._note(read)
        return out

    def _note(self, hosts: set[int]) -> None:
        """Find who reads: the innermost module of the base whose method is running."""
        frame, reader = sys._getframe(2), None
        while frame is not None and reader is None:
            own = frame.f_locals.get("self")
            reader = own if isinstance(own, nn.Module) and id(own) in self.paths else None
            frame = frame.f_back
        owned = [] if reader is None else [t for t in reader._parameters.values() if t is not None]
        tied = set().union(*map(self._of, owned)) - {id(reader)}  # itself: a forward kept from before it was adapted
        for host in hosts:
            self.reads[host][OUTSIDE if reader is None else self.paths[id(reader)]] = host in tied


def _changes_tensors(delta: Delta) -> bool:
    return delta.place == "forward" and delta.site.kind in READ


def _place(t: Tensor) -> tuple[Any, Any, Any] | None:
    """The storage of a tensor and the bytes in it between which it lies; None if it has none of its own."""
    try:
        storage, begin = t.untyped_storage()._cdata, t.storage_offset()
    except (RuntimeError, NotImplementedError):  # sparse tensors, and subclasses which wrap others
        return None
    extent = 1 + sum((size - 1) * step for size, step in zip(t.shape, t.stride()))
    return storage, begin * t.element_size(), (begin + extent) * t.element_size()
