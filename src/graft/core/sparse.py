"""Sparse maps of features: a matrix whose few entries are trained, between the bases of two transforms."""

import torch
from torch import Tensor


def features_first(x: Tensor) -> Tensor:
    """[..., features] as [features, tokens], in which rows are picked and added fast."""
    return x.reshape(-1, x.shape[-1]).T.contiguous()


def sparse_map(h: Tensor, value: Tensor, rows: Tensor, columns: Tensor, size: int) -> Tensor:
    """S h [size, tokens] for h [features, tokens], S[rows[l], columns[l]] = value[l]; entries at one place add up.

    Neither S nor as many features of every token as there are values are kept for backward: only h is.
    """
    return _SparseMap.apply(h, value, rows, columns, size)  # type: ignore[return-value]


class _SparseMap(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(h, value, rows, columns, size):
        picked = h.index_select(0, columns) * value[:, None]
        return h.new_zeros(size, h.shape[1]).index_add(0, rows, picked)

    @staticmethod
    def setup_context(ctx, inputs, output):
        h, value, rows, columns, _ = inputs
        ctx.width = h.shape[0]
        ctx.save_for_backward(h, value, rows, columns)

    @staticmethod
    def backward(ctx, *grads):
        g = grads[0]
        h, value, rows, columns = ctx.saved_tensors
        dh = dvalue = None
        if ctx.needs_input_grad[0]:
            dh = sparse_map(g, value, columns, rows, ctx.width)
        if ctx.needs_input_grad[1]:
            dvalue = (h.index_select(0, columns) * g.index_select(0, rows)).sum(1)
        return dh, dvalue, None, None, None
