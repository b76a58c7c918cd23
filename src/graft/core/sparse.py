"""Sparse changes of a matrix: values at chosen entries, whose gradients are computed at these entries only.

    W' = W + S,  S[index] = value     for flat positions `index` [k], rising, in W [out, in], and `value` [k]

What training keeps for backward beside x is `value` and its gradient, both [k]. W' is formed and dropped at each use.
"""

import warnings

import torch
from torch import Tensor

HAS_MKL = torch.backends.mkl.is_available()  # its sparse products
BLOCK = 2**22  # entries of dL/dW' that exist at a time


def placed(w: Tensor, value: Tensor, index: Tensor) -> Tensor:
    """W + S, for apply_formed."""
    return w.reshape(-1).index_add(0, index, value).view(w.shape)


def pulled(g: Tensor, x: Tensor, w: Tensor, value: Tensor, index: Tensor) -> tuple[Tensor, None]:
    """dL/dvalue for g = dL/dy [n, out] and x [n, in], for apply_formed; none for the index."""
    if torch.is_grad_enabled():  # the sampled product has no derivative
        return (g.mT @ x).flatten()[index].to(value.dtype), None
    return torch.ops.graft.sampled_product(g, x, index).to(value.dtype), None


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


torch.library.define("graft::sampled_product", "(Tensor g, Tensor x, Tensor index) -> Tensor")


@torch.library.impl("graft::sampled_product", "CompositeExplicitAutograd")
def sampled_product(g: Tensor, x: Tensor, index: Tensor) -> Tensor:
    """The entries of g^T x [out, in] at the flat positions `index` [k], which rise, in float32 at least."""
    wide = torch.promote_types(x.dtype, torch.float32)
    shape = g.shape[1], x.shape[1]
    few = 8 if x.dtype.itemsize >= 4 else 40  # where half precision is fast, products of all entries pay off sooner
    on_cpu = x.device.type == "cpu"
    starts = torch.searchsorted(index, torch.arange(shape[0] + 1, device=index.device, dtype=index.dtype) * shape[1])
    if HAS_MKL and on_cpu and few * len(index) <= shape[0] * shape[1]:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
            zeros = torch.zeros(len(index), dtype=wide)
            columns = (index % shape[1]).to(starts.dtype)
            where = torch.sparse_csr_tensor(starts, columns, zeros, shape, check_invariants=True)
        return torch.sparse.sampled_addmm(where, g.to(wide).mT, x.to(wide), beta=0).values()
    rows = max(1, BLOCK // shape[1])
    if rows >= shape[0]:
        return (g.mT @ x).flatten()[index].to(wide)
    made = torch.empty(len(index), dtype=wide, device=x.device)
    bounds = starts.tolist()
    for first in range(0, shape[0], rows):
        a, b = bounds[first], bounds[min(first + rows, shape[0])]
        made[a:b] = (g[:, first : first + rows].mT @ x).flatten()[index[a:b] - first * shape[1]]
    return made


@torch.library.register_fake("graft::sampled_product")
def _(g, x, index):
    return x.new_empty(index.shape, dtype=torch.promote_types(x.dtype, torch.float32))


def _for_each(info, in_dims, *args):
    each = [t.expand(info.batch_size, *t.shape) if d is None else t.movedim(d, 0) for t, d in zip(args, in_dims)]
    return torch.stack([torch.ops.graft.sampled_product(*row) for row in zip(*each)]), 0


torch.library.register_vmap("graft::sampled_product", _for_each)
