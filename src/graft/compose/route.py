"""One adapter per row: each row of a batch is served by an adapter of its own, or by none.

While a route is open, it decides in its thread what runs at the hosts of its model; which adapters are active does not
count there. What the rows of one host need is in rows.py.
"""

import copy
import threading
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from ..core import host as hosting
from ..core.adapter import Adapter
from ..core.errors import GraftError
from ..core.host import Adapted
from ..core.registry import registry, unwrapped
from .rows import rows_at

Row = str | None | Sequence[str]

_OPEN: ContextVar[tuple["Route", ...]] = ContextVar("graft_routes", default=())
_open, _counting = 0, threading.Lock()  # routes in all threads
_latest: "Route | None" = None  # that was opened where gradients are wanted


@contextmanager
def route(model: nn.Module, rows: Sequence[Row]) -> Iterator["Route"]:
    """Serve row i of every batch by the adapter `rows[i]`: its name, None for the base, or several names as a chain.

    A batch of k len(rows) rows counts as k rows each (beams, several answers a prompt). The same is `adapters=rows` as
    an argument of the model's forward and of `generate`. It holds for the thread that opened it. Gradients of a row
    reach its own adapters; call backward inside where activations are checkpointed. An adapter of a bank that is
    replaced meanwhile stays as it was; one of the model cannot leave. Heads of different sizes: missing outputs are
    -inf.

    GraftError for a name that is not there, a batch of another size, a module that mixes rows, and a full bank.
    """
    opened = Route(model, rows)
    opened.enter()
    try:
        yield opened
    finally:
        opened.leave()


class Route:
    """Which adapters serve the rows of a batch, and what runs at each host because of it. Made by `route`."""

    def __init__(self, model: nn.Module, rows: Sequence[Row]):
        found = registry(model)
        if found is None:
            raise GraftError(f"{type(unwrapped(model)).__name__} carries no adapter")
        found.check_unmerged()
        if isinstance(rows, str) or not len(rows):
            raise GraftError(f"rows must be a list with a name or None for each row, not {rows!r}")
        names = [(row,) if isinstance(row, str) else tuple(row or ()) for row in rows]
        taken: dict[str, Adapter] = {}
        self.hosts: Collection[nn.Module] = found.hosts
        self._let_go: list[Callable[[], None]] = []
        try:
            for name in dict.fromkeys(n for row in names for n in row):
                taken[name], let_go = found.take(name)
                self._let_go.append(let_go)
        except BaseException:
            self.close()
            raise
        self.adapters = [tuple(taken[n] for n in row) for row in names]
        self.closed, self.calls = False, 0
        self.model: nn.Module | None = None  # whose call opened it, by an argument
        self._chains: dict[Any, Callable] = {}

    def enter(self) -> None:
        """Open it in this thread."""
        global _latest
        hosting.routed = routed_chain
        _count(1)
        if torch.is_grad_enabled():
            _latest = self
        _OPEN.set((*_OPEN.get(), self))

    def leave(self) -> None:
        """Close it in the thread that opened it."""
        _OPEN.set(tuple(r for r in _OPEN.get() if r is not self))
        _count(-1)
        self.close()

    def close(self) -> None:
        """Let go of the adapters and of what was stacked."""
        self.closed, self.adapters, self._chains = True, [], {}
        if _latest is self:  # it is remembered, and must not keep its model in memory
            self.hosts, self.model = weakref.WeakSet(self.hosts), None
        while self._let_go:
            self._let_go.pop()()

    @contextmanager
    def some(self, rows: list[int]) -> Iterator[None]:
        """A batch consists of these rows only."""
        one = copy.copy(self)
        one.adapters, one._chains = [self.adapters[i] for i in rows], {}
        token = _OPEN.set((*_OPEN.get(), one))
        try:
            yield
        finally:
            _OPEN.reset(token)

    def chain(self, host: Adapted, place: str) -> Callable:
        """What runs at `host` in place of its own chain."""
        found = self._chains.get((host, place))
        if found is None:
            path = host.site.path
            rows = [tuple(d for a in row if (d := a.deltas.get(path)) and d.place == place) for row in self.adapters]
            found = self._chains[host, place] = rows_at(host, place, rows, self.adapters, self.some)
        return found


def _count(change: int) -> None:
    global _open
    with _counting:
        _open += change
        hosting.routes_open = _open > 0


def routed_chain(host: Adapted, place: str) -> Callable | None:
    """The chain of `host` under the route that is open in this thread for its model, if there is one."""
    global _latest
    for opened in reversed(_OPEN.get()):
        if host in opened.hosts:
            return opened.chain(host, place)
    if _latest is not None and host in _latest.hosts:
        # Backward runs a checkpointed forward again, on accelerators in a thread of its own.
        if torch._C._current_graph_task_id() != -1:
            if _latest.closed:
                raise GraftError(
                    "backward recomputes checkpointed activations of a batch that was routed, and the route is closed: "
                    "call backward inside graft.route, which a batch argument cannot do"
                )
            return _latest.chain(host, place)
        if torch.is_grad_enabled():
            _latest = None
    return None


def begin_call(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Open the route that a call of `model` asks for by its argument `adapters`."""
    if torch.compiler.is_compiling():
        if kwargs.get("adapters") is not None:
            raise GraftError("a compiled model takes no argument adapters: use graft.route(model, ...) around the call")
        return None
    if "adapters" not in kwargs:
        if own := _of_call(model):
            own.calls += 1
        return None
    kwargs = dict(kwargs)
    if (rows := kwargs.pop("adapters")) is not None:
        opened = Route(model, rows)
        opened.enter()
        opened.calls, opened.model = 1, model
    return args, kwargs


def end_call(model: nn.Module) -> None:
    """Close the route that the call which ends had opened."""
    if not torch.compiler.is_compiling() and (own := _of_call(model)):
        own.calls -= 1
        if not own.calls:
            own.leave()


def _of_call(model: nn.Module) -> Route | None:
    return next((r for r in reversed(_OPEN.get()) if r.model is model), None)
