"""nn.Linear and GPT-2's layer, which keeps W transposed."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import GraftError
from ..formed import Formed, Rescale, as_in, rescaled
from ..site import KINDS, Site, host_class, qualified


class LinearSite(Site, hosts=(nn.Linear,)):
    """y = x W^T + b over the last axis, W [out, in]."""

    kind = "linear"
    taps = 1  # positions of a kernel: d_in counts each input channel this many times
    d_out = width = property(lambda self: self.module.weight.shape[0])
    d_in = property(lambda self: self.module.weight.shape[1])
    inputs = property(lambda self: self.d_in)  # channels of the input, which in a convolution are fewer than columns
    weight = property(lambda self: self.module.weight)

    def __init__(self, path, module, **position):
        super().__init__(path, module, **position)
        own = module._parameters.get("weight")
        if own is None or self.coded:
            return
        if own.dtype.itemsize == 1 or any(qualified(c) in KINDS for c in type(own).__mro__):
            raise GraftError(
                f"{path} ({host_class(module).__name__}) keeps its weight as codes of type {own.dtype}, which cannot "
                f"be decoded here: choose other modules, or quantise with torch, torchao or bitsandbytes"
            )

    def where(self):
        return self.module.weight

    def apply(self, x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
        """The host's own map with the matrix w [out, in] in place of W."""
        return F.linear(x, as_in(x, w), bias if bias is None else as_in(x, bias))

    def apply_formed(
        self,
        x: Tensor,
        form: Callable,
        w: Tensor,
        bias: Tensor | None,
        *tensors: Tensor,
        pull: Callable | None = None,
    ) -> Tensor:
        """apply(x, form(w, *tensors), bias) that keeps x, w and `tensors` for backward and forms W' again there.

        `form` is pure, and what it computes with besides its arguments is no tensor. It gets them in x's dtype.
        Where W is frozen, `pull(g, x, w, *tensors)` returns the gradients of `tensors` from g = dL/dy [n, out] and
        x [n, in], for methods that do so with less than dL/dW' = g^T x [out, in] and the derivative of `form`.
        """
        return Formed.apply(form, pull, x, w, bias, *tensors)  # type: ignore[return-value]

    def plain_in(self, x: Tensor) -> bool:
        """Whether x meets the matrix itself in a product, both in single precision or more."""
        return x.dtype == self.where().dtype and x.dtype.itemsize >= 4 and not torch.is_autocast_enabled(x.device.type)

    def down(self, x: Tensor, a: Tensor) -> Tensor:
        """k features of the input: the host's map with the matrix a [k, in]."""
        return _thin(x, a)

    def up(self, h: Tensor, b: Tensor) -> Tensor:
        """The matrix b [out, k] on the k features of h."""
        return _thin(h, b)

    def add_up(self, y: Tensor, h: Tensor, b: Tensor) -> Tensor:
        """y + up(h, b)."""
        if self.kind != "linear" or (y.dim() > 1 and y.shape[-2] == 1):  # of one token the views cost more
            return y + self.up(h, b)
        # One pass over y; adding a finished product would take three.
        out = torch.addmm(y.reshape(-1, len(b)), as_in(y, h.reshape(-1, b.shape[1])), as_in(y, b.T))
        return out.view(y.shape)

    def kron(self, x: Tensor, left: Tensor, right: tuple[Tensor, ...]) -> Tensor:
        """The host's map with the matrix left ⊗ (... right[1] right[0]), which is never formed.

        left is [a, c] and the product of `right` [b, d], for a host with a b outputs and c d inputs.
        """
        first, *rest = (m.to(x.dtype) for m in right)
        h = F.linear(x.unflatten(-1, (left.shape[1], -1)), first)  # [..., c, k]
        h = F.linear(h.transpose(-1, -2), left.to(x.dtype)).transpose(-1, -2)  # [..., a, k]
        for m in rest:
            h = F.linear(h, m)
        return h.flatten(-2)

    def scale(self, h: Tensor, v: Tensor | float) -> Tensor:
        """The channels of an output or of features h times the vector v."""
        return h * (v if isinstance(v, float | int) else self._shape(v.to(h.dtype), h))

    def shift(self, h: Tensor, v: Tensor) -> Tensor:
        """The channels of an output or of features h plus the vector v."""
        return h + self._shape(v.to(h.dtype), h)

    def rescale(self, y: Tensor, gain: Tensor, bias: Tensor | None = None) -> Tensor:
        """The channels of y - bias times 1 + gain, plus bias; nothing of the size of y is kept but the result."""
        gain, bias = self._shape(gain, y), None if bias is None else self._shape(as_in(y, bias), y)
        return Rescale.apply(y, gain, bias) if torch.is_grad_enabled() else rescaled(y, gain, bias)

    def _shape(self, v: Tensor, h: Tensor) -> Tensor:
        return v

    def rows(self, v: Tensor) -> Tensor:
        """The vector v [out] shaped to multiply the rows of the matrix: scale(f(x), v) = f(x) with rows(v) * W."""
        return v[:, None]

    def columns(self, v: Tensor) -> Tensor:
        """The vector v [inputs] shaped to multiply the columns of the matrix: f(scale(x, v)) = f(x), columns(v) * W."""
        return v

    def layout(self, w: Tensor, b: Tensor | None) -> dict[str, Tensor]:
        """The tensors of a checkpoint for the matrix w [out, in] and bias b."""
        return {"weight": w} if b is None else {"weight": w, "bias": b}


class Conv1DSite(LinearSite, hosts=("transformers.pytorch_utils.Conv1D",)):
    """GPT-2's layer keeps W as [in, out]."""

    d_out = width = property(lambda self: self.module.weight.shape[1])
    d_in = property(lambda self: self.module.weight.shape[0])
    weight = property(lambda self: self.module.weight.T)

    def layout(self, w, b):
        return super().layout(w.T.contiguous(), b)


def _thin(x: Tensor, m: Tensor) -> Tensor:
    """x m^T in the dtype of x, for a matrix m with a short side."""
    dtype = small_product(x, m)
    if dtype == x.dtype:
        return F.linear(x, as_in(x, m))
    return F.linear(x.to(dtype), m).to(x.dtype)


def small_product(x: Tensor, m: Tensor) -> torch.dtype:
    """The dtype in which to multiply x with the small tensor m: that of x, but for one token on a CPU.

    There a product in half precision takes longer to begin than all of it takes in the float32 of m, uncast.
    """
    few = x.device.type == "cpu" and x.dim() > 1 and x.shape[-2] == 1
    return m.dtype if few and m.dtype.itemsize > x.dtype.itemsize else x.dtype
