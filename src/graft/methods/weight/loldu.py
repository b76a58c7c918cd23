"""LoLDU: Low-Rank Adaptation via Lower-Diag-Upper Decomposition for Parameter-Efficient Fine-Tuning. Shi et al.,
2024."""

from typing import Annotated

import torch
from torch import Tensor, nn

from ...core.delta import Paper
from ...core.hyper import Range
from .low_rank import Between


class LoLDU(Between, name="loldu"):
    """W' = W + L (s diag(z) - s_0 diag(d)) U: only the diagonal z [rank] and the scale s are trained.

    They are frozen parts of W = P L D U: L [out, rank] are the first columns of P L (unit lower triangular, its rows
    permuted by P), d the first `rank` entries of D, from which z starts, and U [rank, in] the first rows of the unit
    upper triangular matrix. s starts at s_0 = alpha / rank. L, U and d are made from W and not saved; where a pivot is
    zero, the row of U is that of D U, which is not divided by it. There are at most min(in, out) of them.

    Formulas and defaults are those of the authors' code (github.com/SKDDJ/LoLDU), which keeps the residual
    W - s_0 L diag(d) U in place of W; the default rank there is 768 and alpha 1.
    """

    papers = (
        Paper(
            "LoLDU: Low-Rank Adaptation via Lower-Diag-Upper Decomposition for Parameter-Efficient Fine-Tuning",
            "Shi et al.",
            2024,
            "https://arxiv.org/abs/2410.13618",
        ),
    )
    known = (
        "Its authors report comparable results with 2600 times fewer trained parameters than is usual, on instruction "
        "following, language understanding and images."
    )
    small = dict(rank=3)
    L: Tensor
    U: Tensor
    d: Tensor

    def __init__(
        self,
        site,
        *,
        rank: Annotated[int, "entries of the diagonal that are trained", Range(1)] = 768,
        alpha: Annotated[float, "numerator of the start of the scale s", Range(above=0)] = 1.0,
    ):
        super().__init__(site)
        P, L, U = torch.linalg.lu(site.weight.detach().double())
        d = U.diagonal()[:rank]
        U = U[:rank][: len(d)] / torch.where(d == 0, 1, d)[:, None]
        for name, t in {"L": (P @ L)[:, : len(d)], "U": U, "d": d}.items():
            self.register_buffer(name, t.float().contiguous(), persistent=False)
        self.start = alpha / rank
        self.z = nn.Parameter(self.d.clone())
        self.scale = nn.Parameter(torch.tensor(self.start))

    def factors(self):
        return self.U, self.L * self.change()

    def change(self):
        """The diagonal [rank] of what is added between L and U."""
        return self.scale * self.z - self.start * self.d

    def prepare(self, inner):
        return self.U, self.change(), self.L
