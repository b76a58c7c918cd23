"""Running code on tensors without contents, and counting the bytes that they would take."""

import copy
import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry

from .kernels import WITHIN

aten, prim = torch.ops.aten, torch.ops.prim
SMALL = 2**16  # elements of a new tensor that is made in earnest
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


class _Fake(FakeTensorMode):
    def __deepcopy__(self, memo: dict) -> "_Fake":
        return self  # a copied tensor is one of the same mode


class Dry(TorchDispatchMode):
    """While it is on, what is computed from the weights of a `twin` has shape, dtype and device, but no contents.

    What does not depend on weights (tokens, masks, counters of a schedule) is computed as ever, so that shapes that
    depend on data are right. A question about contents that are not there is answered: numbers are 1, conditions hold,
    a mask picks everything, numbers are all different, and what is counted is spread evenly.

    events  the storages by number in the order in which they came (n) and went (~n); sizes: their bytes
    kinds   what a storage is for, by number, where that is known
    flops   floating point operations of matrix products, convolutions and attention, as torch counts them
    """

    def __init__(self):
        super().__init__()
        self.fake = _Fake(allow_non_fake_inputs=True)
        self.events: list[int] = []
        self.sizes: list[int] = []
        self.kinds: dict[int, str] = {}
        self.flops = 0
        self._alive: dict[int, tuple[int, Any]] = {}  # (number, reference) by the address of a storage
        self._backward = False

    def twin(self, model: nn.Module, device: torch.device) -> nn.Module:
        """A copy of a model without contents, which stays where it is; the model may be on the meta device."""
        memo = {}
        for t in (*model.parameters(), *model.buffers()):
            made = self._like(t, device)
            memo[id(t)] = nn.Parameter(made, t.requires_grad) if isinstance(t, nn.Parameter) else made
        made = copy.deepcopy(model, memo)
        made.__dict__["to"] = lambda *args, **kwargs: made
        self.mark("weights", (*made.parameters(), *made.buffers()))
        return made

    def mark(self, kind: str, tensors: Iterable[Any]) -> None:
        """Say what the storages of these tensors are for, unless an earlier mark has said it."""
        for t in tensors:
            if isinstance(t, Tensor) and (number := self._seen(t)) is not None:
                self.kinds.setdefault(number, kind)

    def peak(self, since: int = 0) -> tuple[int, dict[str, int]]:
        """The most bytes alive at a time, and how many of them are of which kind; "temporary" where none is known.

        From event number `since` on.
        """
        totals = list(accumulate(self.sizes[n] if n >= 0 else -self.sizes[~n] for n in self.events))
        most = max(range(since, len(totals)), key=totals.__getitem__)
        alive: set[int] = set()
        for n in self.events[: most + 1]:
            alive.add(n) if n >= 0 else alive.discard(~n)
        parts: dict[str, int] = defaultdict(int)
        for n in alive:
            parts[self.kinds.get(n, "temporary")] += self.sizes[n]
        return totals[most], parts

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is prim.device.default:
            return args[0].fake_device if isinstance(args[0], FakeTensor) else args[0].device
        self._enter_backward()
        given = list(_tensors((args, kwargs)))
        if any(isinstance(t, FakeTensor) for t in given):
            out = self._faked(func, types, args, kwargs, given)
        else:
            out = func(*args, **kwargs) if given else self._new(func, types, args, kwargs)
        for t in _tensors(out):
            self._seen(t)
        if within := WITHIN.get(func._schema.name):
            self.events += [len(self.sizes), ~len(self.sizes)]
            self.sizes.append(within(*args, **kwargs))
        if count := flop_registry.get(func._overloadpacket):
            self.flops += count(*args, **kwargs, out_val=out)
        return out

    def _enter_backward(self) -> None:
        """When a backward pass begins, what is alive and nothing else is what was saved for it."""
        before, self._backward = self._backward, torch._C._current_graph_task_id() != -1
        if self._backward and not before:
            for number, _ in self._alive.values():
                self.kinds.setdefault(number, "saved")

    def _new(self, func: Any, types: Any, args: tuple, kwargs: Any) -> Any:
        """A tensor from numbers alone: what is large would take its memory."""
        made = self._dispatch(func, types, args, kwargs)
        return made if not isinstance(made, Tensor) or made.numel() > SMALL else func(*args, **kwargs)

    def _faked(self, func: Any, types: Any, args: tuple, kwargs: Any, given: list[Tensor]) -> Any:
        if func is aten._local_scalar_dense.default:
            return torch.ones((), dtype=args[0].dtype).item()
        if func is aten.nonzero.default:
            return self._empty(args[0].numel(), args[0].ndim)
        if func is aten.bincount.default:
            return self._evenly(args[0].numel(), kwargs.get("minlength", 0))
        if func is aten._unique2.default:
            return self._different(args[0])
        if func in INDEXING:
            args = (args[0], [j for i in args[1] for j in self._positions(i)], *args[2:])
            given = list(_tensors((args, kwargs)))
        if all(isinstance(t, FakeTensor) for t in given):
            return self._dispatch(func, types, args, kwargs)
        # What has contents keeps them where something without contents would be written into it.
        kept = [
            a for a, s in zip(args, func._schema.arguments)
            if s.alias_info and s.alias_info.is_write and isinstance(a, Tensor) and not isinstance(a, FakeTensor)
        ]  # fmt: skip
        args, kwargs = tree_map_only(Tensor, self._without_contents, (args, kwargs))
        out = self._dispatch(func, types, args, kwargs)
        return kept[0] if kept else out

    def _dispatch(self, func: Any, types: Any, args: tuple, kwargs: Any) -> Any:
        out = self.fake.dispatch(func, types, args, kwargs)
        self.fake.fake_tensor_converter.meta_converter.tensor_memo.clear()  # `nn.Module.to` wants no weak references
        return out

    def _positions(self, index: Tensor | None) -> list[Tensor | None]:
        """An index as positions, which a mask becomes within its kernel too."""
        if index is None or index.dtype not in (torch.bool, torch.uint8):
            return [index]
        if isinstance(index, FakeTensor):
            return [self._empty(index.numel()) for _ in range(index.ndim)]
        return list(index.nonzero().unbind(1))

    @staticmethod
    def _evenly(count: int, bins: int) -> Tensor:
        return torch.full((bins,), count // bins) if bins else torch.tensor([count])

    def _different(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The values of t, which of them each one is, and how often each occurs."""
        return self._empty(t.numel()).to(t.dtype), self._empty(*t.shape), self._empty(t.numel())

    def _empty(self, *shape: int) -> Tensor:
        with self.fake:
            return torch.empty(shape, dtype=torch.int64)

    def _without_contents(self, t: Tensor) -> Tensor:
        return t if isinstance(t, FakeTensor) else self._like(t, t.device)

    def _like(self, t: Tensor, device: torch.device) -> Tensor:
        with self.fake:
            return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device)

    def _seen(self, t: Tensor) -> int | None:
        """The number of its storage, which is followed from now on; a sparse tensor has none."""
        if t.layout != torch.strided:
            return None
        storage = t.untyped_storage()
        key = storage._cdata
        if key not in self._alive:
            number = len(self.sizes)

            def gone(_: Any) -> None:
                del self._alive[key]
                self.events.append(~number)

            self._alive[key] = number, weakref.ref(storage, gone)
            self.sizes.append(storage.nbytes())
            self.events.append(number)
        return self._alive[key][0]


def _tensors(values: Any) -> Iterator[Tensor]:
    """In lists and mappings, too."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _tensors(value)
    elif isinstance(values, dict):
        yield from _tensors(list(values.values()))
