"""What methods share that train chosen entries of a matrix and leave the others."""

import zlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ...core import selection
from ...core.delta import Delta
from ...core.drawn import subset
from ...core.sparse import placed, pulled


class Entries(Delta):
    """W' = W + S: `value` [k], zero at first, lies at the flat positions `index` [k] in W [out, in], in rising order.

    `pick` finds the positions; they are those of the file for a delta that comes from one, and those that `give` gave
    the site where it has looked at all matrices together. So many as `drawn` come from the adapter's seed and the
    site's path, by exact arithmetic, and are not saved, unless a file has others.
    """

    index: Tensor

    def __init__(self, site, pick: Callable[[], Tensor] | None = None, drawn: int | None = None):
        super().__init__(site)
        size = site.d_out * site.d_in
        drawn = None if site.saved and "index" in site.saved else drawn
        if drawn is not None:
            index = subset(drawn, size, torch.initial_seed(), zlib.crc32(site.path.encode()))
        else:
            index = pick() if pick and site.saved is None else selection.allotted(site)
        index = index.to(torch.int32 if size < 2**31 else torch.int64)
        self.register_buffer("index", index, persistent=drawn is None)
        self.value = nn.Parameter(torch.zeros(len(index)))

    def forward(self, inner, x):
        w, b = inner.weight, self.bias(inner.bias)
        return self.site.apply_formed(x, placed, w, b, self.value, self.index, pull=pulled)

    def weight(self, w):
        return placed(w.to(torch.promote_types(w.dtype, self.value.dtype)), self.value, self.index)

    def entries(self):
        return self.index, self.value
