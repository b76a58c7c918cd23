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


class Rebuilding(TorchFunctionMode):
    """Refuses to make tensors far larger than any of the model or of the file: a file may claim any size.

    Once `spare_if_saved` has seen a delta whose tensors are all in the file, random numbers are no longer drawn.
    """

    def __init__(self, saved: dict[str, Tensor], model: nn.Module):
        super().__init__()
        largest = max((t.numel() for t in (*saved.values(), *model.parameters())), default=0)
        self.limit = 16 * largest + 2**20
        self.spare = False

    def spare_if_saved(self, delta: nn.Module, saved: dict[str, Tensor] | None) -> None:
        own = (*delta.named_parameters(), *delta.named_buffers())
        self.spare = saved is not None and all(name in saved for name, _ in own)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _MAKERS and "out" not in kwargs and (size := _count(func, args, kwargs)) > self.limit:
            raise GraftError(f"it asks for a tensor of {size:,} values, far more than its file or the base have")
        if self.spare and func in _RANDOM:
            return args[0] if args else kwargs["tensor"]
        if self.spare and func in (torch.empty, torch.rand, torch.randn):  # zeros: what follows may compute with them
            return torch.zeros(*args, **{k: v for k, v in kwargs.items() if k not in ("generator", "memory_format")})
        return func(*args, **kwargs)


def _count(func, args: tuple, kwargs: dict) -> int:
    """The number of values which a call makes."""
    sizes = args[0] if len(args) == 1 and isinstance(args[0], tuple | list) else args
    if func in _SIZED and "size" not in kwargs and all(type(n) is int for n in sizes):
        return math.prod(sizes)
    plain = {k: v for k, v in kwargs.items() if k != "generator"}
    return func(*args, **plain | {"device": "meta"}).numel()
