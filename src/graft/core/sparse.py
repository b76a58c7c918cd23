"""Sparse maps of features: a matrix whose few entries are trained, and the gradients of these entries alone."""

import functools
import warnings

import torch
from torch import Tensor

HAS_MKL = torch.backends.mkl.is_available()  # its sparse products


def features_first(x: Tensor) -> Tensor:
    """[..., features] as [features, tokens], in which rows are picked and added fast."""
    return x.reshape(-1, x.shape[-1]).T.contiguous()


def sparse_map(h: Tensor, value: Tensor, rows: Tensor, columns: Tensor, size: int) -> Tensor:
    """S h [size, tokens] for h [features, tokens] and S[rows[l], columns[l]] = value[l], each place named once.

    In float32 or float64. Neither S nor as many features of every token as there are values are kept for backward.
    """
    return _SparseMap.apply(h, value, rows, columns, size)  # type: ignore[return-value]


class _SparseMap(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(h, value, rows, columns, size):
        if HAS_MKL and h.device.type == "cpu":
            return torch.ops.graft.sparse_product(h, value, rows, columns, size)
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
            if HAS_MKL and g.device.type == "cpu" and not torch.is_grad_enabled():  # it has no derivative
                index, order = (rows * ctx.width + columns).sort()
                found = sampled_product(g.T, h.T, index)
                dvalue = torch.zeros_like(found).index_copy(0, order, found)
            else:
                dvalue = (h.index_select(0, columns) * g.index_select(0, rows)).sum(1)
        return dh, dvalue, None, None, None


def sampled_product(g: Tensor, x: Tensor, index: Tensor) -> Tensor:
    """The entries of g^T x [out, in] at the flat positions `index` [k], which rise, in float32 at least; by MKL."""
    return torch.ops.graft.sampled_product(g, x, index)


torch.library.define("graft::sampled_product", "(Tensor g, Tensor x, Tensor index) -> Tensor")
torch.library.define(
    "graft::sparse_product", "(Tensor h, Tensor value, Tensor rows, Tensor columns, int size) -> Tensor"
)


def _matrix(rows: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    """The sparse matrix of entries in rising order."""
    starts = torch.searchsorted(rows, torch.arange(shape[0] + 1))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(starts, columns, values, shape, check_invariants=True)


@torch.library.impl("graft::sampled_product", "cpu")
def _sampled_product(g: Tensor, x: Tensor, index: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    width = x.shape[1]
    zeros = torch.zeros(len(index), dtype=wide)
    where = _matrix(index // width, index % width, zeros, (g.shape[1], width))
    return torch.sparse.sampled_addmm(where, g.to(wide).mT, x.to(wide), beta=0).values()


@torch.library.impl("graft::sparse_product", "cpu")
def _sparse_product(h: Tensor, value: Tensor, rows: Tensor, columns: Tensor, size: int) -> Tensor:
    order = (rows * len(h) + columns).argsort()
    return _matrix(rows[order], columns[order], value[order], (size, len(h))) @ h


@torch.library.register_fake("graft::sampled_product")
def _(g, x, index):
    return x.new_empty(index.shape, dtype=torch.promote_types(x.dtype, torch.float32))


@torch.library.register_fake("graft::sparse_product")
def _(h, value, rows, columns, size):
    return h.new_empty(size, h.shape[1])


def _for_each(op, info, in_dims, *args):
    each = [
        [a] * info.batch_size if not isinstance(a, Tensor) else a.expand(info.batch_size, *a.shape) if d is None
        else a.movedim(d, 0)
        for a, d in zip(args, in_dims)
    ]  # fmt: skip
    return torch.stack([op(*row) for row in zip(*each)]), 0


for _op in (torch.ops.graft.sampled_product, torch.ops.graft.sparse_product):
    torch.library.register_vmap(_op.default, functools.partial(_for_each, _op))
