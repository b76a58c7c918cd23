"""Building deltas whose values come from a file: what it may ask for, and what can be spared."""

import math

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .errors import GraftError

_MAKERS = {torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.randint, torch.randperm,
           torch.eye, torch.arange, torch.linspace}  # fmt: skip
_SIZED = {torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn}  # whose arguments are the size
_RANDOM = {
    torch.Tensor.uniform_, torch.Tensor.normal_, nn.init.uniform_, nn.init.normal_, nn.init.trunc_normal_,
    nn.init.kaiming_uniform_, nn.init.kaiming_normal_, nn.init.xavier_uniform_, nn.init.xavier_normal_,
}  # fmt: skip
_DRAWN = {
    torch.empty: torch.zeros, torch.rand: torch.zeros, torch.randn: torch.zeros, torch.randperm: torch.arange,
    torch.randint: lambda *args, **kwargs: torch.zeros(_size(*args, **kwargs), dtype=torch.long),
}  # fmt: skip


def _size(*args, size=None, **_):
    """The size which randint(low, high, size) or randint(high, size) is given."""
    return args[-1] if size is None else size


class Rebuilding(TorchFunctionMode):
    """Refuses to make tensors far larger than any of the model or of the file: a file may claim any size.

    With `spare`, no random numbers are drawn, and `spared` tells whether some would have been.
    """

    def __init__(self, saved: dict[str, Tensor], model: nn.Module, spare: bool):
        super().__init__()
        largest = max((t.numel() for t in (*saved.values(), *model.parameters())), default=0)
        self.limit = 16 * largest + 2**20
        self.spare, self.spared = spare, False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _MAKERS and "out" not in kwargs and (size := _count(func, args, kwargs)) > self.limit:
            raise GraftError(f"it asks for a tensor of {size:,} values, far more than its file or the base have")
        if self.spare and func in _RANDOM:
            self.spared = True
            return args[0] if args else kwargs["tensor"]
        if self.spare and func in _DRAWN:  # what follows may compute with them, so that they are numbers
            self.spared = self.spared or func is not torch.empty
            kwargs = {k: v for k, v in kwargs.items() if k not in ("generator", "memory_format")}
            return _DRAWN[func](*args, **kwargs)
        return func(*args, **kwargs)


def _count(func, args: tuple, kwargs: dict) -> int:
    """The number of values which a call makes."""
    sizes = args[0] if len(args) == 1 and isinstance(args[0], tuple | list) else args
    if func in _SIZED and "size" not in kwargs and all(type(n) is int for n in sizes):
        return math.prod(sizes)
    plain = {k: v for k, v in kwargs.items() if k != "generator"}
    return func(*args, **plain | {"device": "meta"}).numel()
