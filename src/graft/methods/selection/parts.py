"""What methods share that train parts of a matrix: whole columns, or square blocks."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.delta import Delta
from ...core.sparse import placed


class Columns(Delta):
    """W' = W + S: `value` [out, k], zero at first, is added to the columns `index` [k] of W [out, in].

        y = W x + value x[index]

    Of the input only these k features are kept for backward, and only the gradient of the k columns is made.
    """

    hosts = ("linear",)
    passes_x = True
    by_factors = True
    index: Tensor

    def __init__(self, site, index: Tensor):
        super().__init__(site)
        self.register_buffer("index", index)
        self.value = nn.Parameter(torch.zeros(site.d_out, len(index)))

    def prepare(self, inner):
        return self.value, self.index

    def act(self, inner, x, value, index):
        return self.site.add_up(inner(x), x.index_select(-1, index), value)

    def factors(self):
        return F.one_hot(self.index.long(), self.site.d_in).to(self.value.dtype), self.value

    def weight(self, w):
        return w.to(torch.promote_types(w.dtype, self.value.dtype)).index_add(1, self.index, self.value)

    def entries(self):
        rows = torch.arange(self.site.d_out, device=self.index.device)[:, None]
        return (rows * self.site.d_in + self.index).flatten(), self.value.flatten()


class Blocks(Delta):
    """W' = W + S: `value` [k, size, size], zero at first, is added to k blocks of W [out, in].

    `index` [k] counts the blocks row by row in the grid [out / size, in / size]. The forward computes with k blocks of
    the input, and the backward makes the gradients of these blocks alone.
    """

    hosts = ("linear",)
    passes_x = True
    index: Tensor

    def __init__(self, site, index: Tensor, size: int):
        super().__init__(site)
        self.register_buffer("index", index)
        self.value = nn.Parameter(torch.zeros(len(index), size, size))

    def prepare(self, inner):
        across = self.site.d_in // self.value.shape[-1]
        return self.value, self.index // across, self.index % across

    def act(self, inner, x, value, rows, columns):
        y, size = inner(x), value.shape[-1]
        parts = x.unflatten(-1, (-1, size)).index_select(-2, columns)  # [..., k, size]
        h = torch.einsum("...kj,kij->...ki", parts, value.to(x.dtype))
        return y.unflatten(-1, (-1, size)).index_add(-2, rows, h.to(y.dtype)).flatten(-2)

    def weight(self, w):
        index, value = self.entries()
        return placed(w.to(torch.promote_types(w.dtype, value.dtype)), value, index)

    def entries(self):
        value, rows, columns = self.prepare(None)
        within, size = torch.arange(value.shape[-1], device=value.device), value.shape[-1]
        rows, columns = rows[:, None] * size + within, columns[:, None] * size + within  # [k, size]
        return (rows[:, :, None] * self.site.d_in + columns[:, None, :]).flatten(), value.flatten()
