"""What a model that carries adapters remembers: which they are, which of them run, and what it was before."""

import functools
import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from torch import nn

from . import host as hosting
from .errors import GraftError
from .host import Adapted, Deltas, mount, unmount
from .sites.quantised import quantised_sites

if TYPE_CHECKING:
    from .adapter import Adapter

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")  # of an adapter
_HOME = "_graft"  # where a model keeps its registry


def unwrapped(model: nn.Module) -> nn.Module:
    """The module itself inside torch.compile's wrapper, which runs it again when its adapters change."""
    while type(model).__name__ == "OptimizedModule":
        model = model._modules["_orig_mod"]  # type: ignore[assignment]
    return model


class _Still:
    """`train` of a module with running statistics while adapters are on the model: it stays in evaluation mode.

    In training mode it would follow the data and so change the frozen base.
    """

    def __init__(self, module: nn.Module, follows: bool):
        self.module, self.follows = module, follows

    def __call__(self, mode: bool = True) -> nn.Module:
        for child in self.module.children():  # deltas, when it is a host
            child.train(mode)
        return self.module


class _RowsArgument:
    """The argument `adapters` of a model's forward and of its `generate`: the rows of graft.route for that call.

    A model with an argument of that name keeps its own.
    """

    def __init__(self, model: Any):
        self.model, self.handles = model, []
        if "adapters" not in inspect.signature(model.forward).parameters:
            self.handles = [
                model.register_forward_pre_hook(self.before, prepend=True, with_kwargs=True),
                model.register_forward_hook(self.after, always_call=True),
            ]
        self.own = model.__dict__.get("generate")
        if hasattr(type(model), "generate"):
            self.__doc__ = type(model).generate.__doc__
            model.__dict__["generate"] = self

    __signature__ = property(lambda self: inspect.signature(functools.partial(type(self.model).generate, self.model)))

    def before(self, model, args, kwargs):
        if hosting.routed is not None or "adapters" in kwargs:
            return _routes().begin_call(model, args, kwargs)

    def after(self, model, args, out):
        if hosting.routed is not None:
            _routes().end_call(model)

    def __call__(self, *args, adapters=None, **kwargs):
        own = self.own or functools.partial(type(self.model).generate, self.model)
        with nullcontext() if adapters is None else _routes().route(self.model, adapters):
            return own(*args, **kwargs)

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()
        if self.model.__dict__.pop("generate", None) is not None and self.own is not None:
            self.model.__dict__["generate"] = self.own


def _routes() -> Any:
    from ..compose import route  # only where rows are asked for: the core itself knows no routes

    return route


class Registry:
    """The adapters of one model in the order of their chain, and what the base was before the first one came."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.adapters: dict[str, Adapter] = {}  # innermost first
        self.active: tuple[str, ...] = ()  # those that run, in the same order
        self.merged: Any = None  # the Merge in place, if there is one
        self.serving: list[str] = []  # the adapters of open routes, as often as they are used
        self.bank: Any = None  # the Bank whose adapters can be routed to, if there is one
        self.hosts: set[nn.Module] = set()  # what carries deltas, or serves those of the bank
        self.trainable = [p for p in model.parameters() if p.requires_grad]  # to be restored by the last detach
        for p in self.trainable:
            p.requires_grad_(False)
        self.still = [m for m in model.modules() if m._buffers.get("running_mean") is not None]
        self.quantised = quantised_sites(model)
        for site in self.quantised:
            site.open()
        self.rows = _RowsArgument(model)
        for m in self.still:
            m.__dict__["train"] = _Still(m, m.training == model.training)
            m.training = False

    def close_if_empty(self) -> None:
        """Give the flags of the base back, after the last adapter has left."""
        if self.adapters or self.bank is not None:
            return
        self.rows.close()
        for site in self.quantised:
            site.close()
        for p in self.trainable:
            p.requires_grad_(True)
        for m in self.still:
            before = m.__dict__.pop("train")
            m.training = self.model.training if before.follows else m.training
        del self.model.__dict__[_HOME]

    def mount(self, name: str, delta: Any) -> None:
        mount(name, delta)
        self.hosts.add(delta.site.module)

    def unmount(self, name: str, delta: Any) -> None:
        unmount(name, delta)
        if not isinstance(delta.site.module, Adapted):
            self.hosts.discard(delta.site.module)

    def take(self, name: str) -> tuple["Adapter", Callable[[], None]]:
        """An adapter by name, of the model or of its bank, and what to call when it is no longer used."""
        if name in self.adapters:
            adapter, let_go = self.adapters[name], None
        elif self.bank is not None:
            adapter, let_go = self.bank.take(name)
        else:
            raise GraftError(f"no adapter is called {name!r}; the model has {', '.join(self.adapters) or 'none'}")
        self.serving.append(name)

        def done() -> None:
            self.serving.remove(name)
            if let_go is not None:
                let_go()

        return adapter, done

    def check_unmerged(self) -> None:
        if self.merged is not None:
            raise GraftError(
                f"adapter {', '.join(map(repr, self.merged.names))} is merged into the base: "
                f"undo the merge first, or keep it, with undo() or keep() of what graft.merge gave"
            )

    def check_idle(self, name: str | None = None) -> None:
        """Refuse what a route must not meet: that an adapter it serves leaves, or that weights change under it."""
        if used := next((n for n in self.serving if name in (n, None)), None):
            raise GraftError(f"a route serves adapter {used!r}: close the route first")

    def __getstate__(self):
        return self.__dict__ | {"serving": []}

    def activate(self, names: Iterable[str]) -> None:
        """Run exactly `names`, the first one innermost; they change places with each other in the chain."""
        self.check_unmerged()
        names = tuple(names)
        if unknown := [n for n in names if n not in self.adapters]:
            raise GraftError(f"no adapter is called {unknown[0]!r}; the model has {', '.join(self.adapters) or 'none'}")
        if twice := next((n for n in names if names.count(n) > 1), None):
            raise GraftError(f"adapter {twice!r} is named twice: it runs once in a chain")
        placed = iter(names)
        order = [next(placed) if n in names else n for n in self.adapters]
        self.adapters = {n: self.adapters[n] for n in order}
        changed = {*names, *self.active} if names != self.active else set()
        self.active = names
        hosts = {id(d.site.module): d.site.module for n in changed for d in self.adapters[n].deltas.values()}
        for module in hosts.values():
            module.relink(names)


def check_name(name: str) -> None:
    if not NAME.fullmatch(name):
        raise GraftError(f"an adapter's name holds letters, digits, - and _ only, not {name!r}")
    if hasattr(Deltas(), name):
        raise GraftError(
            f"an adapter cannot be called {name!r}, which torch's modules have an attribute for: say {name}-1"
        )


def registry(model: nn.Module) -> Registry | None:
    return unwrapped(model).__dict__.get(_HOME)


def open_registry(model: nn.Module) -> Registry:
    """The registry of a model, made if it has none; the base is frozen from then on."""
    model = unwrapped(model)
    return registry(model) or model.__dict__.setdefault(_HOME, Registry(model))


def adapters(model: nn.Module) -> dict[str, "Adapter"]:
    """The adapters on `model` by name, in the order of their chain (the first one innermost)."""
    found = registry(model)
    return dict(found.adapters) if found else {}


def activate(model: nn.Module, *names: str) -> None:
    """Run exactly the adapters `names`, in this order from the inside; none at all gives the base.

    The order stays: from then on it is theirs in the chain, in which they are listed, switched on again and saved.
    """
    found = registry(model)
    if found is None:
        raise GraftError(f"{type(model).__name__} carries no adapter")
    found.activate(names)


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """The base model, for the duration of the context, e.g. as the reference of preference tuning; in a route too."""
    found = registry(model)
    if found is None:
        yield model
        return
    before = found.active
    found.activate(())
    try:
        with nullcontext() if hosting.routed is None else _routes().route(model, [None]):
            yield model
    finally:
        found.activate(before)


def adapted_hosts(model: nn.Module) -> dict[str, Adapted]:
    """The modules that carry deltas, by path."""
    return {path: m for path, m in model.named_modules() if isinstance(m, Adapted)}
