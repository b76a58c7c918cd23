"""Bone: Block-Affine Adaptation of Large Language Models. Kang, 2024."""

from typing import Annotated

import torch
from torch import nn

from ...core.delta import Delta, Paper
from ...core.errors import GraftError
from ...core.formats.peft import As, Peft
from ...core.hyper import Range


class Bone(Delta, name="bone"):
    """W'_ij = W_ij + W_ij D_i + D_i for the [block, block] blocks of W: one affine map per row of blocks.

    D [out / block, block, block] starts at zero. W' depends on W, so a step costs the product of full fine-tuning;
    W' is formed again in backward instead of being kept. The same as PEFT's MiSS with init_weights="bat".
    """

    papers = (
        Paper(
            "Bone: Block-Affine Adaptation of Large Language Models", "Kang", 2024, "https://arxiv.org/abs/2409.15371"
        ),
    )
    known = (
        "Its authors report 49.36 on GSM8K after LLaMA2-7B was trained on MetaMathQA, 5.84 more than with PiSSA, and "
        "fast convergence. PEFT's documentation calls it about half as fast as MiSS and in need of more memory."
    )
    hosts = ("linear", "conv")
    small = dict(block=4)
    neutral = {"D": 0.0}
    peft = Peft(
        "MISS",
        {"D": As("miss_block")},
        config={"r": "block"},
        fixed={"bias": "none", "init_weights": "bat"},
        neutral=frozenset({"miss_dropout", "mini_r"}),
        hosts=("Linear",),
    )

    def __init__(self, site, *, block: Annotated[int, "side of the square blocks of W", Range(1)] = 32):
        super().__init__(site)
        if site.d_in % block or site.d_out % block:
            raise GraftError(f"bone: block {block} must divide both sizes of {site.path} ({site.d_out} x {site.d_in})")
        self.D = nn.Parameter(torch.zeros(site.d_out // block, block, block))

    def forward(self, inner, x):
        return self.site.apply_formed(x, _moved, inner.weight, self.bias(inner.bias), self.D, pull=_gradient)

    def weight(self, w):
        return _moved(w.to(torch.promote_types(w.dtype, self.D.dtype)), self.D)


def _moved(w, D):
    tall = _tall(w, D)
    return (torch.baddbmm(tall, tall, D).view(len(D), D.shape[1], -1, D.shape[1]) + D[:, :, None]).view(w.shape)


def _tall(w, D):
    """[out / b, b * in / b, b]: the blocks of a row on top of each other, mixed by line."""
    return w.reshape(len(D), -1, D.shape[1])


def _gradient(g, x, w, D):
    """dL/dD_i = sum_j W_ij^T G_ij + G_ij for the blocks of G = dL/dW'."""
    G = _tall(g.mT @ x, D)
    direct = G.view(len(D), D.shape[1], -1, D.shape[1]).sum(2)
    return (torch.baddbmm(direct, _tall(w.to(G.dtype), D).mT, G).to(D.dtype),)
