"""NoRA: Nested Low-Rank Adaptation for Efficient Fine-Tuning Large Models. Lin et al., 2024."""

from typing import Annotated

import torch
from torch import nn

from ...core.delta import Paper
from ...core.hyper import Range
from .spectrum import Spectral


class NestedLoRA(Spectral, name="nested_lora"):
    """W' = W + U diag(s) B A V: a LoRA of rank `inner` inside one of rank `rank` that is frozen.

    The outer LoRA are the largest singular triplets U [out, rank], s and V [rank, in] of W, made from W and not saved;
    A [inner, rank] is random (Kaiming uniform) and B [rank, inner] zero, so that 2 rank inner parameters are trained,
    whatever the size of W. The nesting is the paper's. How it splits s between the outer matrices was read in a review
    of the paper only; the activation-aware decomposition of its later version (Efficient Fine-Tuning of Large Models
    via Nested Low-Rank Adaptation. Li et al., 2025) is left out. Of the authors' repository only the front page could
    be read: the defaults are choices.
    """

    papers = (
        Paper(
            "NoRA: Nested Low-Rank Adaptation for Efficient Fine-Tuning Large Models",
            "Lin et al.",
            2024,
            "https://arxiv.org/abs/2408.10280",
        ),
    )
    known = (
        "Its authors report better results than LoRA and its variants on commonsense reasoning, vision-language models "
        "and subject-driven image generation, with fewer trained parameters."
    )
    small = dict(rank=3, inner=2)

    def __init__(
        self,
        site,
        *,
        rank: Annotated[int, "singular triplets in the frozen outer LoRA", Range(1)] = 64,
        inner: Annotated[int, "rank of the trained inner LoRA", Range(1)] = 8,
    ):
        super().__init__(site, rank)
        self.A = nn.Parameter(torch.empty(inner, len(self.s)))
        self.B = nn.Parameter(torch.zeros(len(self.s), inner))
        nn.init.kaiming_uniform_(self.A, a=5**0.5)

    def factors(self):
        return self.A @ self.V, (self.U * self.s) @ self.B
