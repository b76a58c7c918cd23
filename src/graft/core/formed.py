"""Products whose backward keeps less than autograd would."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor


def as_in(x: Tensor, t: Tensor) -> Tensor:
    """t in the dtype of x; Tensor.to takes its time to find that nothing is to be done."""
    return t if t.dtype == x.dtype else t.to(x.dtype)


def all_in(dtype: torch.dtype, tensors: Iterable[Tensor]) -> list[Tensor]:
    return [t.to(dtype) if t.is_floating_point() else t for t in tensors]


def _lines(t: Tensor) -> Tensor:
    """[..., features] as [tokens, features]."""
    return t.reshape(-1, t.shape[-1])


class Formed(torch.autograd.Function):
    """x W'^T + b with W' = form(w, *tensors), which is formed twice instead of kept."""

    generate_vmap_rule = True

    @staticmethod
    def forward(form, pull, x, w, bias, *tensors):
        w, *tensors = all_in(x.dtype, (w, *tensors))
        return F.linear(x, form(w, *tensors), bias if bias is None else bias.to(x.dtype))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.form, ctx.pull, x, w, bias, *tensors = inputs
        ctx.save_for_backward(x, w, bias, *tensors)

    @staticmethod
    def backward(ctx, *grads):
        g = grads[0]
        x, w, bias, *tensors = ctx.saved_tensors
        need_x, need_w, need_bias, *need = ctx.needs_input_grad[2:]
        given = [w, *tensors]
        moving = [i for i, needed in enumerate([need_w, *need]) if needed]

        def formed(*values):
            now = dict(zip(moving, values))
            return ctx.form(*all_in(x.dtype, (now.get(i, t) for i, t in enumerate(given))))

        found = {}
        if moving and (need_w or not ctx.pull):
            matrix, pull = torch.func.vjp(formed, *(given[i] for i in moving))[:2]
            dw = _lines(g).mT @ _lines(x).to(g.dtype)
            found = dict(zip(moving, pull(dw.to(matrix.dtype))))
        else:
            if moving:  # before W' is there, so that what it takes on the way is not beside it
                found = dict(enumerate(ctx.pull(_lines(g), _lines(x).to(g.dtype), *given), 1))
            matrix = formed() if need_x else w
        dx = (g @ matrix.to(g.dtype)).to(x.dtype) if need_x else None
        db = _lines(g).sum(0).to(bias.dtype) if need_bias else None
        return None, None, dx, found.get(0), db, *(found.get(i + 1) for i in range(len(tensors)))


def rescaled(y: Tensor, gain: Tensor, b: Tensor | None) -> Tensor:
    return torch.addcmul(y, y if b is None else y - b, as_in(y, gain))


class Rescale(torch.autograd.Function):
    """z = y + gain (y - b): the gradient of the gain follows from z, which the next operation often keeps anyway.

    dL/dgain = sum dL/dz (y - b) = sum dL/dz (z - b) / (1 + gain); taken to be zero where 1 + gain is.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(y, gain, b):
        return rescaled(y, gain, b)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output, *inputs[1:])

    @staticmethod
    def backward(ctx, *grads):
        z, gain, b = ctx.saved_tensors
        free, factor = z if b is None else z - b, 1 + gain
        share = (grads[0] * free).sum_to_size(gain.shape) / factor
        to_y = torch.addcmul(grads[0], grads[0], gain.to(z.dtype))
        to_b = (grads[0] - to_y).sum_to_size(b.shape) if b is not None and ctx.needs_input_grad[2] else None
        return to_y, torch.where(factor == 0, 0, share), to_b
