"""What weights alone decide, kept in inference for as long as the weights stay as they are.

Nothing announces a change of a weight, so it is looked for: the tensors must be the same objects, frozen, at the same
address, with the same count of changes in place. What is no tensor and decides as well (a chain of deltas, a setting
of one) starts a new epoch, after which modules and settings are compared, too.
"""

import weakref
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

PLAIN = (Tensor, nn.Parameter)
FREE = 2**16  # bytes that may be kept at a host of any size
_SETTINGS = (bool, int, float, str, tuple, type(None))
_NONE = weakref.ref(type("_Gone", (), {})())  # a reference that gives None
_epoch = object()


def new_epoch() -> None:
    global _epoch
    _epoch = object()


class Inner:
    """What `prepare` sees as `inner`: what lies inside is watched from the moment it is first looked at."""

    def __init__(self, kept: "Kept", inner: Any):
        self._kept, self._inner = kept, inner

    def __getattr__(self, name: str) -> Any:
        self._kept.look_inside(self._inner)
        return getattr(self._inner, name)


class Kept:
    """What a delta's `prepare` gave for `inner`, in `dtype`, with the state of all it may have been made from.

    References are weak: what was replaced does not stay in memory, and nothing at its address is taken for it.
    """

    def __init__(self, delta: Any, inner: Any, dtype: torch.dtype):
        self.epoch, self.inner, self.dtype, self.deep = _epoch, weakref.ref(inner), dtype, False
        self.modules: list[weakref.ref] = []
        self.settings: list[tuple] = []
        self.owned: list[dict[str, Any]] = []  # parameters, buffers and children by name
        self.states: list[Any] = []
        self._watch(delta.sources())
        self.made = delta.prepare(Inner(self, inner))

    def look_inside(self, inner: Any) -> None:
        if not self.deep:
            self.deep = True
            self._watch(inner.sources())

    def _watch(self, modules: list[nn.Module]) -> None:
        self.modules += map(weakref.ref, modules)
        self.settings += map(_settings, modules)
        owned = [d for m in modules for d in (m._parameters, m._buffers, m._modules) if d or d is not m._modules]
        self.owned += owned
        self.states += [_state(thing) for d in owned for thing in d.values()]

    def holds(self, delta: Any, inner: Any, dtype: torch.dtype) -> bool:
        """Whether `delta` would make the same again."""
        if dtype is not self.dtype or _captured(self.made):
            return False
        if self.epoch is not _epoch or self.inner() is not inner:
            now = _epoch
            modules = delta.sources() + (inner.sources() if self.deep else [])
            if len(modules) != len(self.modules) or any(m is not ref() for m, ref in zip(modules, self.modules)):
                return False
            if self.settings != [*map(_settings, modules)]:
                return False
            self.epoch, self.inner = now, weakref.ref(inner)
        things = [*chain.from_iterable(map(dict.values, self.owned))]
        if len(things) != len(self.states):
            return False
        for thing, (ref, version, address) in zip(things, self.states):
            if thing is not ref():
                return False
            if version is not None and (
                thing._version != version or thing.data_ptr() != address or thing.requires_grad
            ):
                return False
        return True

    def smaller_than(self, size: int) -> bool:
        """Whether this may be kept: plain tensors which take fewer bytes than `size`, besides those that are there."""
        made = [t for t in self.made if t is not None]
        if None in self.states or any(type(t) not in PLAIN for t in made) or _captured(self.made):
            return False
        own = {t.untyped_storage().data_ptr() for d in self.owned for t in d.values() if type(t) in PLAIN}
        new = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in made)}
        return sum(n for address, n in new.items() if address not in own) < max(size, FREE)


def _state(thing: Any) -> tuple[weakref.ref, int | None, int] | None:
    """What differs when a tensor was changed or anything replaced; None where that would not be seen."""
    if not isinstance(thing, Tensor):
        return _NONE if thing is None else weakref.ref(thing), None, 0
    if thing.requires_grad or thing.is_inference():  # what is made in inference mode has no counter
        return None
    try:
        return weakref.ref(thing), thing._version, thing.data_ptr()
    except RuntimeError:  # one inside vmap has no address
        return None


def _captured(made: tuple) -> bool:
    """Whether a CUDA graph is recorded: it may outlive what is kept, and what is made in it exists in replays only."""
    return bool(made) and made[0] is not None and made[0].is_cuda and torch.cuda.is_current_stream_capturing()


def _settings(module: nn.Module) -> tuple:
    return tuple(v for v in module.__dict__.values() if type(v) in _SETTINGS)
