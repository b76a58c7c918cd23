"""SVF: singular value fine-tuning, from Transformer-squared: Self-adaptive LLMs. Sun, Cetin, Tang, 2025."""

from typing import Annotated

import torch
from torch import nn

from ...core.delta import Delta, Paper
from .low_rank import Between
from .spectrum import Spectral


class SVF(Between, Spectral, name="svf"):
    """W' = U diag(s z) V for W = U diag(s) V: every singular value is scaled, by z [min(in, out)] trained from one.

    Computed as y + U (s (z - 1) (V x)), with U [out, k], s [k] and V [k, in] made from W and not saved. With
    `keep_sum`, as in the authors' code (github.com/SakanaAI/self-adaptive-llms), all values are then scaled by
    sum(s) / sum(s z); that code also takes z for a sigmoid of its parameters. Experts are mixed by mixing their z.
    """

    papers = (
        Paper("Transformer-squared: Self-adaptive LLMs", "Sun, Cetin, Tang", 2025, "https://arxiv.org/abs/2501.06252"),
    )
    known = (
        "Its authors report better results than LoRA with fewer parameters, trained by reinforcement learning and "
        "mixed anew for each prompt."
    )
    neutral = {"z": 1.0}

    def __init__(self, site, *, keep_sum: Annotated[bool, "scale all singular values so that their sum stays"] = False):
        super().__init__(site)
        self.z = nn.Parameter(torch.ones(len(self.s)))
        self.keep_sum = keep_sum
        if keep_sum:
            self.neutral = Delta.neutral  # the common factor is not linear in z

    def change(self):
        """What is added to the singular values [k]."""
        moved = self.s * self.z
        return moved * (self.s.sum() / moved.sum()) - self.s if self.keep_sum else moved - self.s

    def factors(self):
        return self.V, self.U * self.change()

    def prepare(self, inner):
        return self.V, self.change(), self.U
