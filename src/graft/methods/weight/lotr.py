"""LoTR: Low Tensor Rank Weight Adaptation. Bershatsky et al., 2024."""

from typing import Annotated

import torch
from torch import nn

from ...core.delta import Paper
from ...core.hyper import Range
from .low_rank import LowRank
from .tied import Tied


class LoTR(LowRank, name="lotr"):
    """W'_l = W_l + s B G_l A for the sites l, with B [out, rank] and A [rank, in] shared and G_l [rank, rank] of each.

    Stacked along l the changes are one tensor in Tucker form of two modes; rank (in + out) + L rank^2 parameters for L
    sites of one size. A and B are standard normal and G zero, so that the adapted model starts as the base, and
    s = alpha / rank with alpha 1, as in the authors' code (github.com/daskol/lotr). Sites of one size [out, in] share.
    """

    papers = (
        Paper("LoTR: Low Tensor Rank Weight Adaptation", "Bershatsky et al.", 2024, "https://arxiv.org/abs/2402.01376"),
    )
    known = "Its authors report more for each parameter than with LoRA, above all in deep models."
    small = dict(rank=2)

    @classmethod
    def share(cls, sites, *, rank, **_):
        return Tied(sites, rank, nn.init.normal_, nn.init.normal_)

    def __init__(
        self,
        site,
        shared,
        *,
        rank: Annotated[int, "rank of the shared factors", Range(1)] = 8,
        alpha: Annotated[float, "numerator of the scaling s"] = 1.0,
        dropout: Annotated[float, "probability of dropping an input of the update", Range(0, below=1)] = 0.0,
    ):
        super().__init__(site, shared)
        shared.at(site, self.name, rank)
        self.G = nn.Parameter(torch.zeros(rank, rank))
        self.scaling, self.dropout = alpha / rank, dropout

    def factors(self):
        A, B = self.shared.of(self.site)
        return A, B @ (self.scaling * self.G)
