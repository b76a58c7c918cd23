"""Hydra: Multi-head Low-rank Adaptation for Parameter Efficient Fine-tuning. Kim et al., 2023."""

from typing import Annotated

import torch
from torch import nn

from ...core.delta import Delta, Paper
from ...core.hyper import Range


class Hydra(Delta, name="hydra"):
    """W' = W + s (B A + D C W), b' = b + s D C b: a parallel branch on the input, a sequential one on the output,

        y' = y + s B (A x) + s D (C y).

    A [rank, in] and C [sequential_rank, out] are random (Kaiming uniform), B [out, rank] and D [out, sequential_rank]
    zero, so that the adapted model starts as the base. As in the authors' code (github.com/extremebird/Hydra, ranks of
    2 and s = 1) the sequential branch sees y with its bias. Not for convolutions in groups, whose outputs it would mix.
    """

    papers = (
        Paper(
            "Hydra: Multi-head Low-rank Adaptation for Parameter Efficient Fine-tuning",
            "Kim et al.",
            2023,
            "https://arxiv.org/abs/2309.06922",
        ),
    )
    known = (
        "Its authors report better results than with one branch alone, parallel or sequential, over many benchmarks."
    )
    passes_x = True
    ups = ("B", "D")
    small = dict(rank=2)

    @classmethod
    def refuses(cls, site):
        groups = getattr(site.module, "groups", 1) if site.kind == "conv" else 1
        return (
            f"it is a convolution in {groups} groups, whose outputs the sequential branch mixes" if groups > 1 else None
        )

    def __init__(
        self,
        site,
        *,
        rank: Annotated[int, "rank of the parallel branch", Range(1)] = 2,
        sequential_rank: Annotated[int, "rank of the sequential branch", Range(1)] = 2,
        scale: Annotated[float, "factor s of both branches"] = 1.0,
    ):
        super().__init__(site)
        self.A = nn.Parameter(torch.empty(rank, site.d_in))
        self.B = nn.Parameter(torch.zeros(site.d_out, rank))
        self.C = nn.Parameter(torch.empty(sequential_rank, site.d_out))
        self.D = nn.Parameter(torch.zeros(site.d_out, sequential_rank))
        for random in (self.A, self.C):
            nn.init.kaiming_uniform_(random, a=5**0.5)
        self.scaling = scale

    def prepare(self, inner):
        return self.A, self.B, self.C, self.D

    def act(self, inner, x, A, B, C, D):
        y, site, s = inner(x), self.site, self.scaling
        z = site.add_up(y, s * site.down(x, A), B)
        return site.add_up(z, s * site.up(y, C), D)

    def weight(self, w):
        wide = w.to(torch.promote_types(w.dtype, self.B.dtype))
        return wide + self.scaling * (self.B @ self.A + self.D @ (self.C @ wide))

    def bias(self, b):
        return None if b is None else b + self.scaling * (self.D @ (self.C @ b.to(self.C.dtype)))
