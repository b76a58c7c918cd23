"""BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models. Ben Zaken et al.,
2021."""

import torch
from torch import nn

from ...core.delta import Delta, Paper


class BitFit(Delta, name="bitfit"):
    """y' = y + c, so b' = b + c: the biases are trained and nothing else. c [out] starts at zero.

    Only hosts which have a bias can be adapted; presets leave the others out.
    """

    papers = (
        Paper(
            "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models",
            "Ben Zaken et al.",
            2021,
            "https://arxiv.org/abs/2106.10199",
        ),
    )
    known = (
        "Its authors report that on BERT it equals or beats full fine-tuning with little or moderate training data, "
        "and falls behind it with more. A model without biases, such as Llama, has nothing for it to train."
    )
    hosts = ("linear", "conv", "norm")
    targets = ("all-linear", "norms")
    neutral = {"c": 0.0}
    passes_x = True

    def __init__(self, site):
        super().__init__(site)
        self.c = nn.Parameter(torch.zeros(site.d_out))

    @classmethod
    def refuses(cls, site):
        return "it has no bias" if site.bias is None else None

    def prepare(self, inner):
        return (self.c,)

    def act(self, inner, x, c):
        return self.site.shift(inner(x), c)

    def weight(self, w):
        return w

    def bias(self, b):
        return self.c if b is None else b + self.c
