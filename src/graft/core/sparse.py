"""Sparse matrices whose entries are trained: as changes of a matrix, and as maps of features.

    W' = W + S,  S[index] = value     for flat positions `index` [k], rising, in W [out, in], and `value` [k]
    y = S h                           for S[rows[l], columns[l]] = value[l]

Gradients are computed at the chosen entries only. What training keeps for backward beside the inputs is `value` and its
gradient, both [k]. A W' is formed and dropped at each use.
"""

import functools
import warnings

import numpy as np
import torch
from torch import Tensor

HAS_MKL = torch.backends.mkl.is_available()  # its sparse products
BLOCK = 2**22  # entries of dL/dW' that exist at a time


def placed(w: Tensor, value: Tensor, index: Tensor) -> Tensor:
    """W + S, for apply_formed."""
    return w.reshape(-1).index_add(0, index, value).view(w.shape)


def pulled(g: Tensor, x: Tensor, w: Tensor, value: Tensor, index: Tensor) -> tuple[Tensor, None]:
    """dL/dvalue for g = dL/dy [n, out] and x [n, in], for apply_formed; none for the index."""
    return sampled(g, x, index).to(value.dtype), None


def sampled(g: Tensor, x: Tensor, index: Tensor) -> Tensor:
    """The entries of g^T x [out, in] at the flat positions `index` [k], which rise."""
    if torch.is_grad_enabled():  # the sampled product has no derivative
        return (g.mT @ x).flatten()[index]
    return torch.ops.graft.sampled_product(g, x, index)


def strongest(g: Tensor, x: Tensor, keep: int) -> Tensor:
    """The flat positions, rising, of the `keep` entries of g^T x [out, in] with the largest magnitude."""
    width = x.shape[1]
    rows = max(1, BLOCK // width)
    best, where = x.new_zeros(0), torch.zeros(0, dtype=torch.long, device=x.device)
    for first in range(0, g.shape[1], rows):
        piece = (g[:, first : first + rows].mT @ x).abs().flatten()
        piece, index = piece.topk(min(keep, len(piece)))
        best, where = torch.cat([best, piece]), torch.cat([where, index + first * width])
        best, kept = best.topk(min(keep, len(best)))
        where = where[kept]
    return where.sort().values


def exceeded_by(values: Tensor, count: Tensor) -> Tensor:
    """A bound that `count` of the values, none negative, exceed: fewer if some are equal there. No gradient flows."""
    return torch.ops.graft.exceeded_by(values.detach(), count)


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
                found = torch.ops.graft.sampled_product(g.T, h.T, index)
                dvalue = torch.zeros_like(found).index_copy(0, order, found)
            else:
                dvalue = (h.index_select(0, columns) * g.index_select(0, rows)).sum(1)
        return dh, dvalue, None, None, None


torch.library.define("graft::sampled_product", "(Tensor g, Tensor x, Tensor index) -> Tensor")
torch.library.define(
    "graft::sparse_product", "(Tensor h, Tensor value, Tensor rows, Tensor columns, int size) -> Tensor"
)
torch.library.define("graft::exceeded_by", "(Tensor values, Tensor count) -> Tensor")


def _matrix(rows: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    """The sparse matrix of entries in rising order."""
    _warn_now()
    starts = torch.searchsorted(rows, torch.arange(shape[0] + 1, dtype=rows.dtype)).to(rows.dtype)
    return torch.sparse_csr_tensor(starts, columns, values, shape, check_invariants=True)


@functools.cache
def _warn_now() -> None:
    """Lets torch say, once in a process, that these matrices are in beta; a filter at every use takes longer."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        torch.eye(1).to_sparse_csr()


def by_entries(g: Tensor, x: Tensor, index: Tensor) -> bool:
    """Whether to compute these entries alone, with MKL."""
    few = 8 if x.dtype.itemsize >= 4 else 40  # where half precision is fast, products of all entries pay off sooner
    return HAS_MKL and x.device.type == "cpu" and few * len(index) <= g.shape[1] * x.shape[1]


@torch.library.impl("graft::sampled_product", "CompositeExplicitAutograd")
def sampled_product(g: Tensor, x: Tensor, index: Tensor) -> Tensor:
    """The entries of g^T x [out, in] at the flat positions `index` [k], which rise, in float32 at least."""
    wide = torch.promote_types(x.dtype, torch.float32)
    shape = g.shape[1], x.shape[1]
    if by_entries(g, x, index):
        where = _matrix(index // shape[1], index % shape[1], torch.zeros(len(index), dtype=wide), shape)
        # It reads both with tokens last, and takes longer to lay them out so.
        g, x = (t.to(wide).mT.contiguous() for t in (g, x))
        return torch.sparse.sampled_addmm(where, g, x.mT, beta=0).values()
    rows = max(1, BLOCK // shape[1])
    if rows >= shape[0]:
        return (g.mT @ x).flatten()[index].to(wide)
    made = torch.empty(len(index), dtype=wide, device=x.device)
    bounds = torch.searchsorted(
        index, torch.arange(shape[0] + 1, device=index.device, dtype=index.dtype) * shape[1]
    ).tolist()
    for first in range(0, shape[0], rows):
        a, b = bounds[first], bounds[min(first + rows, shape[0])]
        made[a:b] = (g[:, first : first + rows].mT @ x).flatten()[index[a:b] - first * shape[1]]
    return made


@torch.library.impl("graft::sparse_product", "cpu")
def _sparse_product(h: Tensor, value: Tensor, rows: Tensor, columns: Tensor, size: int) -> Tensor:
    order = (rows * len(h) + columns).argsort()
    return _matrix(rows[order], columns[order], value[order], (size, len(h))) @ h


@torch.library.impl("graft::exceeded_by", "CompositeExplicitAutograd")
def _exceeded_by(values: Tensor, count: Tensor) -> Tensor:
    rest = values.numel() - int(count)
    return values.flatten().kthvalue(rest).values if rest > 0 else values.new_full((), -1.0)


@torch.library.impl("graft::exceeded_by", "cpu")
def _(values: Tensor, count: Tensor) -> Tensor:
    rest = values.numel() - int(count)
    wide = values.to(torch.promote_types(values.dtype, torch.float32)).flatten()
    found = np.partition(wide.numpy(), rest - 1)[rest - 1] if rest > 0 else -1.0  # ten times as fast as kthvalue
    return values.new_tensor(found)


@torch.library.register_fake("graft::exceeded_by")
def _(values, count):
    return values.new_empty(())


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


for _op in (torch.ops.graft.sampled_product, torch.ops.graft.sparse_product, torch.ops.graft.exceeded_by):
    torch.library.register_vmap(_op.default, functools.partial(_for_each, _op))
