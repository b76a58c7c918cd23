"""LoRA: Low-Rank Adaptation of Large Language Models. Hu et al., 2021."""

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import nn

from ...core.delta import Delta, Paper
from ...core.hyper import Range


class LoRA(Delta, name="lora"):
    """W' = W + s B A, computed as y + s (x A^T) B^T, with s = alpha / rank, or alpha / sqrt(rank) if `rslora`.

    A [rank, in] is random (Kaiming uniform) and B [out, rank] zero, so that the adapted model starts as the base.
    Dropout falls on the input of the update only.
    """

    papers = (
        Paper(
            "LoRA: Low-Rank Adaptation of Large Language Models", "Hu et al.", 2021, "https://arxiv.org/abs/2106.09685"
        ),
        Paper(
            "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA",
            "Kalajdzievski",
            2023,
            "https://arxiv.org/abs/2312.03732",
        ),
    )
    small = dict(rank=2)

    def __init__(
        self,
        site,
        *,
        rank: Annotated[int, "rank of the update", Range(1)] = 8,
        alpha: Annotated[float, "numerator of the scaling s"] = 16.0,
        dropout: Annotated[float, "probability of dropping an input of the update", Range(0, below=1)] = 0.0,
        rslora: Annotated[bool, "scale by alpha / sqrt(rank), which keeps high ranks learning"] = False,
    ):
        super().__init__(site)
        self.A = nn.Parameter(torch.empty(rank, site.d_in))
        self.B = nn.Parameter(torch.zeros(site.d_out, rank))
        nn.init.kaiming_uniform_(self.A, a=5**0.5)
        self.scaling, self.dropout = alpha / (rank**0.5 if rslora else rank), dropout

    def forward(self, inner, x):
        z = F.dropout(x, self.dropout, self.training) if self.dropout else x
        return self.site.add_up(inner(x), self.scaling * self.site.down(z, self.A), self.B)

    def weight(self, w):
        return w + self.scaling * self.B @ self.A
