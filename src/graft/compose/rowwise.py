"""A function of one row, run for all rows at once: what torch.func.vmap does, for the few operations of small methods.

A `Rows` stands for one tensor of a row and holds those of all rows. The products below become batched ones, in a tenth
of the time that vmap takes to begin, which counts where a row has one token. Anything else raises `Unsupported`, and
vmap does it. Not for gradients: what is an autograd.Function there takes no `Rows`.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class Unsupported(Exception):
    """Only vmap knows how to do it for all rows at once."""


class Rows:
    """A tensor [...] of each of n rows, held as all [n, ...]."""

    __slots__ = ("all",)

    def __init__(self, all: Tensor):
        self.all = all

    shape = property(lambda self: self.all.shape[1:])
    dtype = property(lambda self: self.all.dtype)
    device = property(lambda self: self.all.device)
    mT = property(lambda self: Rows(self.all.mT) if self.all.dim() > 2 else _unsupported())
    T = property(lambda self: Rows(self.all.mT) if self.all.dim() == 3 else _unsupported())

    def __len__(self):
        return self.all.shape[1]

    def dim(self):
        return self.all.dim() - 1

    def is_floating_point(self):
        return self.all.is_floating_point()

    def to(self, *how, **more):
        return self if how == (self.all.dtype,) else Rows(self.all.to(*how, **more))

    def reshape(self, *shape):
        return Rows(self.all.reshape(len(self.all), *(shape if isinstance(shape[0], int) else shape[0])))

    view = reshape

    def flatten(self, start: int = 0, end: int = -1):
        return Rows(self.all.flatten(_inside(start), _inside(end)))

    def unflatten(self, dim: int, sizes: tuple):
        return Rows(self.all.unflatten(_inside(dim), sizes))

    def transpose(self, a: int, b: int):
        return Rows(self.all.transpose(_inside(a), _inside(b)))

    def sum(self, dim: Any = None, **more):
        return Rows(self.all.sum(_inside(dim))) if isinstance(dim, int) and not more else _unsupported()

    def __getattr__(self, name: str):
        raise Unsupported(name)

    def __add__(self, other):
        return _KNOWN["add"](self, other)

    def __sub__(self, other):
        return _KNOWN["sub"](self, other)

    def __mul__(self, other):
        return _KNOWN["mul"](self, other)

    def __truediv__(self, other):
        return _KNOWN["div"](self, other)

    def __matmul__(self, other):
        return _matmul(self, other)

    __radd__, __rmul__ = __add__, __mul__

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        known = _KNOWN.get(func.__name__)
        if known is None:
            raise Unsupported(func.__name__)
        return known(*args, **kwargs or {})


def _unsupported(*_):
    raise Unsupported


for _name in (
    "neg", "invert", "abs", "bool", "int", "float", "index", "iter", "getitem", "setitem", "eq", "ne", "lt", "le", "gt",
    "ge", "and", "or", "xor", "pow", "rpow", "mod", "floordiv", "rsub", "rtruediv", "rmatmul",
):  # fmt: skip
    setattr(Rows, f"__{_name}__", _unsupported)


def _inside(dim: int) -> int:
    return dim + 1 if dim >= 0 else dim


def _aligned(*values: Any) -> list[Any]:
    """Values that broadcast as those of one row do: the rows come first."""
    tensors = [v for v in values if isinstance(v, Rows | Tensor)]
    wide, narrow = max(t.dim() for t in tensors), min(t.dim() for t in tensors)
    if not narrow and len({t.dtype for t in tensors}) > 1:  # a scalar's dtype counts for nothing, that of a vector does
        raise Unsupported
    return [
        v.all.reshape(len(v.all), *[1] * (wide - v.dim()), *v.shape)
        if isinstance(v, Rows) and v.dim() < wide
        else v.all
        if isinstance(v, Rows)
        else v
        for v in values
    ]


def _elementwise(op: Callable) -> Callable:
    return lambda *values, **how: Rows(op(*_aligned(*values), **how))


def _activation(op: Callable) -> Callable:
    return lambda x, inplace=False, **how: _unsupported() if inplace else Rows(op(x.all, **how))


def _linear(x: Any, w: Any, bias: Any = None) -> Rows:
    if not isinstance(x, Rows):
        raise Unsupported
    if not isinstance(w, Rows):
        if isinstance(bias, Rows):
            raise Unsupported
        return Rows(F.linear(x.all, w, bias))
    flat = x.all.reshape(len(x.all), -1, x.all.shape[-1])
    if bias is None:
        out = torch.bmm(flat, w.all.mT)
    else:
        out = torch.baddbmm(bias.all.unsqueeze(1) if isinstance(bias, Rows) else bias, flat, w.all.mT)
    return Rows(out.view(*x.all.shape[:-1], -1))


def _matmul(a: Any, b: Any) -> Rows:
    if isinstance(a, Rows) and b.dim() == 2:
        return _linear(a, b.mT)
    raise Unsupported


def _addmm(y: Any, a: Any, b: Any) -> Rows:
    if not all(isinstance(v, Rows) and v.dim() == 2 for v in (y, a, b)):
        raise Unsupported
    return Rows(torch.baddbmm(y.all, a.all, b.all))


def _einsum(equation: str, *values: Any) -> Rows:
    if "Z" in equation or not all(isinstance(v, Rows) for v in values):
        raise Unsupported
    terms, out = equation.split("->")
    return Rows(torch.einsum(",".join(f"Z{t.strip()}" for t in terms.split(",")) + f"->Z{out.strip()}", *_all(values)))


def _all(values: Any) -> list[Tensor]:
    return [v.all for v in values]


def _dropout(x: Rows, p: float = 0.5, training: bool = True, inplace: bool = False) -> Rows:
    return _unsupported() if training and p else x


_KNOWN: dict[str, Callable] = {
    "linear": _linear, "matmul": _matmul, "__matmul__": _matmul, "addmm": _addmm, "einsum": _einsum,
    "addcmul": _elementwise(torch.addcmul), "dropout": _dropout,
    **{op.__name__: _activation(op) for op in (F.relu, F.gelu, F.silu, torch.relu, torch.tanh, torch.sigmoid)},
}  # fmt: skip
for _op in (torch.add, torch.sub, torch.mul, torch.div):
    _name = "truediv" if _op is torch.div else _op.__name__
    _KNOWN[_op.__name__] = _KNOWN[f"__{_name}__"] = _elementwise(_op)
for _name in ("add", "mul"):
    _KNOWN[f"__r{_name}__"] = _KNOWN[_name]
