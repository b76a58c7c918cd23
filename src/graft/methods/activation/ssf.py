"""SSF: Scaling & Shifting Your Features: A New Baseline for Efficient Model Tuning. Lian et al., 2022."""

from typing import Annotated

import torch
from torch import nn

from ...core.delta import Delta, Paper
from ...core.hyper import Range


class SSF(Delta, name="ssf"):
    """y' = gamma * y + beta behind every operation, so W' = gamma W and b' = gamma b + beta; gamma, beta [out].

    A host without a bias has no place for beta after merging and is only scaled, unless `shift_all`.
    The paper starts gamma and beta with a spread of 0.02 around one and zero; here they start at one and zero, so that
    the adapted model starts as the base, unless `spread` says otherwise.
    """

    papers = (
        Paper(
            "Scaling & Shifting Your Features: A New Baseline for Efficient Model Tuning",
            "Lian et al.",
            2022,
            "https://arxiv.org/abs/2210.08823",
        ),
    )
    known = (
        "Its authors report more than full fine-tuning with about 0.3 million parameters: 90.72 % against 88.54 % on "
        "FGVC, 73.10 % against 65.57 % on VTAB-1k."
    )
    hosts = ("linear", "conv", "norm")
    targets = ("all-linear", "norms")
    neutral = {"gamma": 1.0, "beta": 0.0}
    passes_x = True

    def __init__(
        self,
        site,
        *,
        spread: Annotated[float, "standard deviation of the start of gamma and beta", Range(0)] = 0.0,
        shift_all: Annotated[bool, "shift hosts without a bias as well, which then cannot be merged"] = False,
    ):
        super().__init__(site)
        self.gamma = nn.Parameter(1 + spread * torch.randn(site.d_out))
        shifted = shift_all or site.bias is not None
        self.beta = nn.Parameter(spread * torch.randn(site.d_out)) if shifted else None

    def prepare(self, inner):
        return self.gamma, self.beta

    def act(self, inner, x, gamma, beta):
        y = self.site.scale(inner(x), gamma)
        return y if beta is None else self.site.shift(y, beta)

    def weight(self, w):
        return w * self.site.rows(self.gamma)

    def bias(self, b):
        if b is None:
            return self.beta
        return b * self.gamma if self.beta is None else b * self.gamma + self.beta
