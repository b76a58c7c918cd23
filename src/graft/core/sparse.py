"""Sparse maps of features: a matrix whose few entries are trained, between the bases of two transforms."""

import torch
from torch import Tensor


def sparse_map(h: Tensor, value: Tensor, rows: Tensor, columns: Tensor, size: int) -> Tensor:
    """S h [..., size] for h [..., features], S[rows[l], columns[l]] = value[l]; entries at one place add up.

    `value` [k] is real, h may be complex. Neither S nor k features of every token are kept for backward: only h is.
    """
    return _SparseMap.apply(h, value, rows, columns, size)  # type: ignore[return-value]


class _SparseMap(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(h, value, rows, columns, size):
        picked = h.index_select(-1, columns) * value
        return h.new_zeros(*h.shape[:-1], size).index_add(-1, rows, picked)

    @staticmethod
    def setup_context(ctx, inputs, output):
        h, value, rows, columns, _ = inputs
        ctx.width = h.shape[-1]
        ctx.save_for_backward(h, value, rows, columns)

    @staticmethod
    def backward(ctx, *grads):
        g = grads[0]
        h, value, rows, columns = ctx.saved_tensors
        dh = dvalue = None
        if ctx.needs_input_grad[0]:
            dh = sparse_map(g, value, columns, rows, ctx.width)
        if ctx.needs_input_grad[1]:
            product = h.index_select(-1, columns).conj() * g.index_select(-1, rows)
            dvalue = (product.real if product.is_complex() else product).flatten(0, -2).sum(0)
        return dh, dvalue, None, None, None
