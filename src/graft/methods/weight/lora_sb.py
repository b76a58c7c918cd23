"""LoRA-SB: a small matrix between frozen factors. Ponkshe et al., 2024."""

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import nn

from ...core.delta import Paper
from ...core.factored import Factored, Start, unit
from ...core.hyper import Range


class LoRASB(Factored, name="lora_sb"):
    """W' = W + B R A with R [rank, rank] trained between frozen A [rank, in] and B [out, rank] of orthonormal rows and
    columns.

    Started by the first update of full fine-tuning (the initialisation `lora_sb`, see there for its options): B A are
    its singular vectors, R its singular values, and B^T G A^T, the gradient of R, is all of the gradient G that their
    space holds, at a scaling of one, whatever the rank. Other initialisations give their directions and sizes likewise;
    with "random" A and B are random, and R is zero.
    """

    papers = (
        Paper(
            "Initialization using Update Approximation is a Silver Bullet for Extremely Efficient Low-Rank Fine-Tuning",
            "Ponkshe et al.",
            2024,
            "https://arxiv.org/abs/2411.19557",
        ),
    )
    known = (
        "Its authors report more than LoRA with 27 to 90 times fewer trained parameters on mathematical and "
        "commonsense reasoning and language understanding."
    )
    passes_x = True
    by_factors = True
    starts_as_base = False
    small = dict(rank=2)
    scaling = 1.0

    A: torch.Tensor
    B: torch.Tensor

    def __init__(
        self,
        site,
        *,
        rank: Annotated[int, "size of R", Range(1)] = 32,
        dropout: Annotated[float, "probability of dropping an input of the update", Range(0, below=1)] = 0.0,
        init: Start = "lora_sb",
    ):
        super().__init__(site)
        self.register_buffer("A", unit(torch.randn(rank, site.d_in))[0])
        self.register_buffer("B", unit(torch.randn(rank, site.d_out))[0].T.contiguous())
        self.R = nn.Parameter(torch.zeros(rank, rank))
        self.dropout = dropout
        self.begin(init, rank)

    def product(self):
        return self.R @ self.A, self.B

    def take(self, A, B):
        (A, right), (B, left) = unit(A), unit(B.T)
        self.A.copy_(torch.where(right[:, None] > 0, A, self.A))
        self.B.copy_(torch.where(left > 0, B.T, self.B))
        self.R.copy_(torch.diag(left * right))

    def prepare(self, inner):
        return self.factors()

    def act(self, inner, x, A, B):
        z = F.dropout(x, self.dropout, self.training) if self.dropout else x
        return self.site.add_up(inner(x), self.site.down(z, A), B)

    def weight(self, w):
        return self.rest(w) + self.B @ (self.R @ self.A)
