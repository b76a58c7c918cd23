"""What methods share that add a product of two thin matrices and have nothing more to say about it."""

from typing import Any

from torch import Tensor

from ...core.delta import Delta


class LowRank(Delta):
    """W' = W + B A, computed as y + B (A x), with the A [k, in] and B [out, k] which `factors` gives."""

    passes_x = True
    by_factors = True

    def factors(self) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def prepare(self, inner) -> tuple[Any, ...]:
        return self.factors()

    def act(self, inner, x, *factors):
        A, B = factors
        return self.site.add_up(inner(x), self.site.down(x, A), B)

    def weight(self, w):
        A, B = self.factors()
        return w + B @ A
