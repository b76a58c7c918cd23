"""Thousands of adapters behind one model, of which a bounded number is resident.

An adapter of a bank is no part of the model: its modules only know the places where it acts. So adding, loading,
replacing and removing one touch neither the modules nor the parameters of the model; what they cost does not depend on
how many there are. Rows are served from the bank by `route`, which keeps what it uses until it closes.
"""

import hashlib
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..core.adapter import Adapter
from ..core.errors import GraftError
from ..core.files import Part, Saved, build, content, fingerprints, parts, read
from ..core.registry import check_name, open_registry


class Bank:
    """Adapters by name, on disk or in memory, of which at most `capacity` are resident: ready to serve.

    model             carries the bank until `close`; names of adapters on the model come before those of the bank
    capacity          how many adapters are resident at most; the one not used for longest leaves for another
    allow_other_base  take adapters that were trained on other weights, too; shapes must fit in any case

    An adapter is read when a route first asks for it, by memory map, and checked as `graft.load` checks it. One that is
    replaced or removed while a route serves it stays until that route closes, for that route alone. All of this may be
    done from several threads.

        bank = graft.Bank(model, capacity=64)
        bank.add("ann", "adapters/ann")
        with graft.route(model, ["ann", "bob", None]):
            model(**batch)
    """

    def __init__(self, model: nn.Module, capacity: int = 64, *, allow_other_base: bool = False):
        if capacity < 1:
            raise GraftError(f"capacity must be at least 1, not {capacity}")
        self.registry = open_registry(model)
        if self.registry.bank is not None:
            raise GraftError(f"{type(self.registry.model).__name__} has a bank already: close it first")
        self.capacity = capacity
        self._base = None if allow_other_base else fingerprints(self.registry.model)
        self._sources: dict[str, Part | Saved] = {}
        self._resident: OrderedDict[str, _Resident] = OrderedDict()  # the one used last at the end
        self._lock = threading.RLock()
        self._shared: weakref.WeakValueDictionary[Any, nn.Module] = weakref.WeakValueDictionary()
        self._seats: dict[tuple[nn.Module, str], Any] = {}
        self.registry.bank = self

    # What it holds

    def add(self, name: str, adapter: "str | Path | Adapter", *, replace: bool = False) -> None:
        """Hold an adapter under a name: a folder that `save` wrote, in any format, or an adapter of this model.

        A folder is read when it is first used. An `Adapter` is copied, in main memory. `replace` puts it in the place
        of another one; routes that are open go on with that.
        """
        check_name(name)
        source: Part | Saved
        if isinstance(adapter, Adapter):
            if adapter.model is not self.registry.model:
                raise GraftError(f"adapter {adapter.name!r} is of another model: save it, and add its folder")
            source = content(adapter)
            source.tensors = {key: value.detach().to("cpu", copy=True) for key, value in source.tensors.items()}
        else:
            source, *others = parts(adapter)
            if others or source.name:
                raise GraftError(
                    f"{adapter} holds several adapters: add each of them, e.g. {source.root / source.name}"
                )
            source.form()  # so that what is no adapter is told now
        with self._lock:
            if name in self._sources and not replace:
                raise GraftError(f"the bank holds an adapter called {name!r} already: replace it with replace=True")
            self._sources[name] = source
            self._resident.pop(name, None)

    def remove(self, name: str) -> None:
        """Hold it no longer."""
        with self._lock:
            self._find(name)
            del self._sources[name]
            self._resident.pop(name, None)

    def __contains__(self, name: object) -> bool:
        return name in self._sources

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._sources))

    def __len__(self) -> int:
        return len(self._sources)

    @property
    def resident(self) -> list[str]:
        """The names of those that are ready to serve, the one used longest ago first."""
        with self._lock:
            return [name for name, entry in self._resident.items() if entry.adapter is not None]

    def __repr__(self) -> str:
        return f"Bank({len(self)} adapters, {len(self.resident)} of at most {self.capacity} resident)"

    # Serving

    def take(self, name: str) -> tuple[Adapter, Callable[[], None]]:
        """An adapter, loaded if need be, and what to call when it is no longer used: until then it stays resident."""
        with self._lock:
            source, entry = self._find(name), self._resident.get(name)
            if entry is None:
                self._make_room()
                entry = self._resident[name] = _Resident()
            self._resident.move_to_end(name)
            entry.users += 1
        try:
            with entry.loading:  # others go on meanwhile
                if entry.adapter is None:
                    entry.adapter = self._load(name, source)
        except BaseException:
            with self._lock:
                entry.users -= 1
                if self._resident.get(name) is entry:
                    del self._resident[name]
            raise

        def let_go():
            with self._lock:
                entry.users -= 1

        return entry.adapter, let_go

    def load(self, *names: str) -> None:
        """Make adapters resident before they are asked for."""
        for name in names:
            self.take(name)[1]()

    def close(self) -> None:
        """Take the bank off the model; refused while a route serves from it."""
        with self._lock:
            if used := [name for name, entry in self._resident.items() if entry.users]:
                raise GraftError(f"a route serves adapter {used[0]!r} of the bank: close the route first")
            self._sources.clear()
            self._resident.clear()
            for (_, place), seat in self._seats.items():
                self.registry.unmount(_seat_name(place), seat)
            self._seats.clear()
            self.registry.bank = None
            self.registry.close_if_empty()

    def __reduce_ex__(self, protocol):
        raise GraftError("a model with a bank cannot be copied or pickled: close the bank first")

    def __enter__(self) -> "Bank":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _find(self, name: str) -> Part | Saved:
        if name not in self._sources:
            raise GraftError(f"no adapter is called {name!r}, on the model or among the {len(self)} of its bank")
        return self._sources[name]

    def _make_room(self) -> None:
        while len(self._resident) >= self.capacity:
            idle = next((name for name, entry in self._resident.items() if not entry.users), None)
            if idle is None:
                raise GraftError(
                    f"the bank is full: all {self.capacity} resident adapters serve open routes; close one, or give "
                    f"the bank a larger capacity"
                )
            del self._resident[idle]

    def _load(self, name: str, source: Part | Saved) -> Adapter:
        model = self.registry.model
        try:
            saved = source if isinstance(source, Saved) else read(model, source, self._base)
            adapter = build(model, saved, name)
            adapter.load_state_dict(saved.tensors, assign=True)
        except GraftError as error:
            raise GraftError(f"adapter {name!r} of the bank: {error}") from error
        adapter.requires_grad_(False)
        with self._lock:
            self._share(adapter)
            for delta in adapter.deltas.values():
                self._seat(delta)
        return adapter

    def _share(self, adapter: Adapter) -> None:
        """Let adapters use one shared module where theirs hold the same (random projections of one seed)."""
        if adapter.shared is None:
            return
        named = (adapter.shared.named_parameters(), adapter.shared.named_buffers())  # also what is not saved
        tensors = {name: tensor for part in named for name, tensor in part}
        if not tensors:
            return
        digest = hashlib.blake2b(adapter.recipe.method.name.encode())
        for key, value in tensors.items():
            digest.update(f"{key}{value.dtype}{list(value.shape)}".encode())
            digest.update(value.contiguous().cpu().view(torch.uint8).numpy().data)
        adapter.shared = shared = self._shared.setdefault(digest.digest(), adapter.shared)
        for delta in adapter.deltas.values():
            object.__setattr__(delta, "shared", shared)

    def _seat(self, delta: Any) -> None:
        """See that the host of a delta asks routes what to run. The first adapter at a host makes it one."""
        key = delta.site.module, delta.place
        if key not in self._seats:
            seat = self._seats[key] = _Seat(delta)
            self.registry.mount(_seat_name(delta.place), seat)
            delta.site.module.relink(delta.site.module.linked)


class _Resident:
    """An adapter that is ready to serve, or is being loaded."""

    def __init__(self):
        self.adapter: Adapter | None = None
        self.users = 0
        self.loading = threading.Lock()


class _Seat(nn.Module):
    """Keeps a module a host while no delta is mounted there; it computes nothing."""

    graft_owned = True

    def __init__(self, delta: Any):
        super().__init__()
        object.__setattr__(self, "site", delta.site)
        self.place = delta.place


def _seat_name(place: str) -> str:
    return f"*bank-{place}"
