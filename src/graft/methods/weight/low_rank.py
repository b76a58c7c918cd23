"""What methods share that add a product of two thin matrices."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.delta import Delta


class LowRank(Delta):
    """W' = W + B A, computed as y + B (A x), with the A [k, in] and B [out, k] which `factors` gives."""

    passes_x = True
    by_factors = True
    dropout = 0.0  # probability of dropping an input of the product

    def factors(self) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def prepare(self, inner) -> tuple[Any, ...]:
        return self.factors()

    def act(self, inner, x, *factors):
        A, B = factors
        z = F.dropout(x, self.dropout, self.training) if self.dropout else x
        return self.site.add_up(inner(x), self.site.down(z, A), B)

    def weight(self, w):
        A, B = self.factors()
        return w + B @ A


class Between(LowRank):
    """W' = W + B diag(c) A, A [k, in] and B [out, k] frozen, where `prepare` gives A, c [k] and B.

    Computed as y + B (c * (A x)), which keeps of the size of a factor nothing for backward. Of all k = min(in, out)
    directions, n inputs take 4 n k (in + out) operations a step beside the host's 4 n in out. Where they are many,
    W' is formed instead, twice, which takes 6 k in out, and 2 n in out for its gradient.
    """

    def __init__(self, site, *args, **kwargs):
        super().__init__(site, *args, **kwargs)
        self.passes_x = site.kind != "linear"

    def forward(self, inner, x):
        # In half precision W' would lose what is small beside W.
        if self.site.kind != "linear" or x.dtype.itemsize < 4 or not torch.is_grad_enabled():
            return super().forward(inner, x)
        A, c, B = self.prepare(inner)
        (k, d_in), d_out = A.shape, len(B)
        n = x.numel() // d_in
        if 4 * n * k * (d_in + d_out) <= (6 * k + 2 * n) * d_in * d_out:
            return self.act(inner, x, A, c, B)
        return self.site.apply_formed(x, _sum, inner.weight, self.bias(inner.bias), A, c, B, pull=_gradients)

    def act(self, inner, x, A, c, B):
        return self.site.add_up(inner(x), self.site.scale(self.site.down(x, A), c), B)


def _sum(w, A, c, B):
    return torch.addmm(w, B * c, A)


def _gradients(g, x, w, A, c, B):
    """None for A and B, which are frozen; dL/dc[i] = B[:, i] dL/dW' A[i]."""
    return None, ((B.to(g.dtype).mT @ (g.mT @ x)) * A.to(g.dtype)).sum(1).to(c.dtype), None
