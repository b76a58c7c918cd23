"""What methods on the singular vectors of a host's matrix share: the vectors, made anew from W instead of saved."""

import torch
from torch import Tensor

from .low_rank import LowRank


class Spectral(LowRank):
    """Keeps frozen U [out, k], s [k] and V [k, in] of W ≈ U diag(s) V: `count` singular triplets of the host's matrix,
    the largest but `first` of them, or all. They are computed from W and not saved.

    In float64, and with the largest entry of each left vector positive, so that one W gives the same vectors everywhere
    as long as its singular values differ. There are at most min(in, out) - `first` of them.
    """

    U: Tensor
    s: Tensor
    V: Tensor

    def __init__(self, site, count: int | None = None, first: int = 0):
        super().__init__(site)
        left, values, right = torch.linalg.svd(site.weight.detach().double(), full_matrices=False)
        kept = slice(first, None if count is None else first + count)
        left, values, right = left[:, kept], values[kept], right[kept]
        sign = left.gather(0, left.abs().argmax(0, keepdim=True)).sign()
        for name, t in {"U": left * sign, "s": values, "V": right * sign.T}.items():
            self.register_buffer(name, t.float().contiguous(), persistent=False)
