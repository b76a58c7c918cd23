"""What methods share that add a product of two thin matrices."""

from typing import Any

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

    Computed as y + B (c * (A x)): B diag(c) would be one more [out, k], and its gradient one more product.
    """

    def act(self, inner, x, A, c, B):
        return self.site.add_up(inner(x), self.site.scale(self.site.down(x, A), c), B)
