"""What methods share that train chosen entries of a matrix and leave the others."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ...core import selection
from ...core.delta import Delta
from ...core.sparse import placed, pulled


class Entries(Delta):
    """W' = W + S: `value` [k], zero at first, lies at the flat positions `index` [k] in W [out, in], in rising order.

    `pick` finds the positions; they are those of the file for a delta that comes from one, and those that `choose` gave
    the site where it has looked at all matrices together.
    """

    index: Tensor

    def __init__(self, site, pick: Callable[[], Tensor] | None = None):
        super().__init__(site)
        index = pick() if pick and site.saved is None else selection.allotted(site)
        small = site.d_out * site.d_in < 2**31
        self.register_buffer("index", index.to(torch.int32 if small else torch.int64))
        self.value = nn.Parameter(torch.zeros(len(index)))

    def forward(self, inner, x):
        w, b = inner.weight, self.bias(inner.bias)
        return self.site.apply_formed(x, placed, w, b, self.value, self.index, pull=pulled)

    def weight(self, w):
        return placed(w.to(torch.promote_types(w.dtype, self.value.dtype)), self.value, self.index)

    def entries(self):
        return self.index, self.value
