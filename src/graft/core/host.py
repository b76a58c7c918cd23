"""Hosts: how deltas run at a module.

A host keeps its identity, parameters and parameter names. While it carries deltas, its class is a subclass of its
own class (as in torch.nn.utils.parametrize) whose `forward` runs the chain of deltas; when the last one leaves, the
class is put back and nothing remains.
"""

import copy
import functools
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .errors import GraftError
from .kept import new_epoch

routed: Callable[[Any, str], Callable | None] | None = None  # what runs at a host under a route, see compose/route.py
routes_open = False  # whether a route is open in any thread: all that compiled code looks at


class Host:
    """The innermost link: the host's own function, matrix and bias."""

    def __init__(self, site, call: Callable):
        self.site, self.call = site, call

    def __call__(self, *args, **kwargs):
        return self.call(*args, **kwargs)

    def sources(self) -> list[nn.Module]:
        return [*base_modules(self.site.module).values()]

    weight = property(lambda self: self.site.weight)
    bias = property(lambda self: self.site.bias)


class Link:
    """What a delta sees as `inner` when another delta lies inside."""

    def __init__(self, inner, delta: Any):
        self.inner, self.delta = inner, delta

    def __call__(self, *args, **kwargs):
        return self.delta(self.inner, *args, **kwargs)

    def sources(self) -> list[nn.Module]:
        return self.delta.sources() + self.inner.sources()

    weight = property(lambda self: self.delta.weight(self.inner.weight))
    bias = property(lambda self: self.delta.bias(self.inner.bias))
    tensors = property(lambda self: self.delta.tensors(self.inner))


class Deltas(nn.ModuleDict):
    """The deltas at one host, by the name of their adapter; "*" and the name: what the sites of the adapter share."""

    graft_owned = True

    def forward(self, x):
        """Nothing: a host which runs its children in turn (nn.Sequential) runs this one too."""
        return x


class Adapted(nn.Module):
    """Mixed into the class of a host while it carries deltas.

    `deltas` are those mounted; `chain` is the function which runs the linked ones, innermost first.
    """

    host_class: type
    host_forward: Callable | None  # a forward which was set on the instance (accelerate does that)
    site: Any
    deltas: Any  # Deltas
    linked: tuple[str, ...]
    chain: Any

    def relink(self, names: Iterable[str]) -> None:
        """Run the deltas of the adapters `names`, the first one innermost."""
        self.linked = tuple(name for name in names if name in self.deltas)
        deltas = [self.deltas[name] for name in self.linked]
        inner = Host(self.site, own_function(self))
        new_epoch()
        self.chain = functools.reduce(Link, [d for d in deltas if d.place == "forward"], inner)
        self.site.relinked(deltas)

    def __getstate__(self):
        return {k: v for k, v in self.__dict__.items() if k not in ("chain", "product")}

    def __setstate__(self, state):
        super().__setstate__(state)
        self.relink(self.linked)

    def __reduce_ex__(self, protocol):
        return _blank, (self.host_class,), self.__getstate__()


def run(host: Any, place: str, chain: Callable, *args, **kwargs):
    """What a host computes once there have been routes: compiled code leaves its graph where one is open."""
    if torch.compiler.is_compiling():
        return _run(host, place, chain, *args, **kwargs) if routes_open else chain(*args, **kwargs)
    assert routed
    return (routed(host, place) or chain)(*args, **kwargs)


@torch._disable_dynamo
def _run(host: Any, place: str, chain: Callable, *args, **kwargs):
    return run(host, place, chain, *args, **kwargs)


def own_function(host: Adapted) -> Callable:
    """What a host computes without deltas."""
    return host.host_forward or types.MethodType(host.host_class.forward, host)


def _blank(host_class: type):
    return object.__new__(adapted_class(host_class))


@functools.cache
def adapted_class(cls: type) -> type:
    """The subclass of `cls` that runs deltas; it keeps the name and the signature, which transformers reads."""

    @functools.wraps(cls.forward)
    def forward(self, *args, **kwargs):
        if routed is not None:
            return run(self, "forward", self.chain, *args, **kwargs)
        return self.chain(*args, **kwargs)

    body = {"host_class": cls, "forward": forward, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (Adapted, cls), body)


_OURS = ("deltas", "chain", "linked", "site", "host_forward")  # attributes of a host


def mount(name: str, delta: Any) -> None:
    """Put `delta` at its host; `relink` then decides which deltas run, and in which order."""
    host = delta.site.module
    if not isinstance(host, Adapted):
        places = (host.__dict__, host._modules, host._parameters, host._buffers)
        if taken := [a for a in _OURS if any(a in place for place in places) or hasattr(type(host), a)]:
            raise GraftError(f"{delta.site.path} ({type(host).__name__}) has an attribute {taken[0]!r} of its own")
        own = host.__dict__.get("forward")
        plain = Host(delta.site, own or types.MethodType(type(host).forward, host))
        host.__dict__.update(host_forward=own, site=delta.site, linked=(), chain=plain)
        host.deltas = Deltas()
        host.__class__ = adapted_class(type(host))  # last: another thread may be running the host
        host.__dict__.pop("forward", None)
    elif delta.place != "forward" and host.site.kind != delta.site.kind:
        host.site = delta.site  # only the site of such a place can link its deltas
    host.deltas[name] = delta


def unmount(name: str, delta: Any) -> None:
    """Take `delta` away; the last one to leave restores the host exactly."""
    host = delta.site.module
    if type(host) is not adapted_class(host.host_class):
        raise GraftError(
            f"{delta.site.path}: its class became {type(host).__name__} after the delta was mounted "
            f"(FSDP, parametrize?); undo that first"
        )
    del host.deltas[name]
    host.relink(n for n in host.linked if n != name)
    if not host.deltas:
        strip(host)


def strip(host: Adapted) -> None:
    """Put the class and the attributes of a host back as they were."""
    late = host.__dict__.get("forward")
    if getattr(late, "__func__", None) is type(host).forward:  # transformers 4.57 leaves it where it recorded outputs
        del host.__dict__["forward"]
    own, host.__class__ = host.host_forward, host.host_class
    del host.deltas
    for attribute in _OURS[1:]:
        host.__dict__.pop(attribute, None)
    if own is not None:
        host.forward = own


def bare_copy(module: nn.Module) -> nn.Module:
    """A deep copy without the deltas on it and in it."""
    twin = copy.deepcopy(module)
    for m in list(twin.modules()):
        m.__dict__.pop("train", None)  # a frozen module's own, see registry.py; the copy is trained
        if isinstance(m, Adapted):
            m.relink(())
            strip(m)
    return twin


def is_owned(module: nn.Module) -> bool:
    """Whether a module belongs to an adapter; nn.Module is slow to say that it lacks an attribute."""
    return getattr(type(module), "graft_owned", False) or "graft_owned" in module.__dict__


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of the base by path, each once, without those of adapters."""
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()

    def walk(path: str, module: nn.Module) -> None:
        if id(module) in seen or is_owned(module):
            return
        seen.add(id(module))
        found[path] = module
        for name, child in module._modules.items():
            if child is not None:
                walk(f"{path}.{name}" if path else name, child)

    walk("", model)
    return found


def base_parameters(modules: dict[str, nn.Module]) -> dict[str, Tensor]:
    """The parameters of the `base_modules` by name, each once."""
    found: dict[int, tuple[str, Tensor]] = {}
    for path, module in modules.items():
        for name, p in module._parameters.items():
            if p is not None:
                found.setdefault(id(p), (f"{path}.{name}" if path else name, p))
    return dict(found.values())
