"""LoRA-GGPO: Mitigating Double Descent in LoRA Fine-Tuning via Gradient-Guided Perturbation Optimization."""

from typing import Annotated

import torch

from ...core.delta import Paper
from ...core.factored import Start
from ...core.hyper import Range
from .lora import LoRA


class LoRAGGPO(LoRA, name="lora_ggpo"):
    """W' = W + s B A, and while it trains y + E x: E [out, in] is noise, drawn anew at every forward, of the deviation

        (sigma ||W'_i|| + beta ||G_i||^2) / sqrt(out) in row i,    G = s (B dL/dA + dL/dB A) of the last step,

    so that minima are sought that are flat where weights and gradients are large, without the second pass of SAM.
    No gradient goes through E, and nothing of it is kept; row norms come in closed form, without a matrix [out, in].
    In evaluation and once merged this is a LoRA with A [rank, in] and B [out, rank]; with sigma = beta = 0 in training,
    too. The first step has no noise.

    Source: of the paper's first version neither the text nor the code could be read; its later versions, LoRA-MGPO, are
    another method, which follows the momentum. Formula and defaults are those of kohya's sd-scripts
    (`networks/lora_flux.py`), which has an estimate in place of the norms of the rows of W. Another reimplementation,
    which names the paper's equations 6 to 8, has the variance sigma^2 (||W_i||^2 + beta ||G_i||^2) / in instead.
    """

    papers = (
        Paper(
            "LoRA-GGPO: Mitigating Double Descent in LoRA Fine-Tuning via Gradient-Guided Perturbation Optimization",
            "Chang et al.",
            2025,
            "https://arxiv.org/abs/2502.14538v1",
        ),
    )
    known = (
        "Its authors report better results than LoRA and its variants in language understanding and generation, and "
        "that it eases the double descent which they see in LoRA."
    )
    peft = adapter_hub = lycoris = "its noise is for training: graft.convert makes a LoRA of it"

    deviation: torch.Tensor  # [out]

    def __init__(
        self,
        site,
        *,
        rank: Annotated[int, "rank of the update", Range(1)] = 8,
        alpha: Annotated[float, "numerator of the scaling s"] = 16.0,
        dropout: Annotated[float, "probability of dropping an input of the update", Range(0, below=1)] = 0.0,
        rslora: Annotated[bool, "scale by alpha / sqrt(rank), which keeps high ranks learning"] = False,
        init: Start = "random",
        sigma: Annotated[float, "share of the norms of weights in the noise", Range(0)] = 0.03,
        beta: Annotated[float, "share of the squared norms of gradients in the noise", Range(0)] = 0.01,
    ):
        super().__init__(site, rank=rank, alpha=alpha, dropout=dropout, rslora=rslora, init=init)
        self.sigma, self.beta = sigma, beta
        self.register_buffer("deviation", torch.zeros(site.d_out))

    def prepare(self, inner):
        return *super().prepare(inner), self.deviation if self.noisy else None

    def act(self, inner, x, A, B, c=None, deviation=None):
        y = super().act(inner, x, A, B, c)
        if deviation is None:
            return y
        with torch.no_grad():
            noise = torch.randn(len(deviation), self.site.d_in, dtype=y.dtype, device=y.device)
            noise = self.site.apply(x, noise.mul_(deviation.to(y.dtype)[:, None]))
        return y + noise

    @property
    def noisy(self) -> bool:
        return self.training and (self.sigma > 0 or self.beta > 0)

    def gradient_norms(self) -> torch.Tensor:
        """[out], of the rows of G; zeros before there are gradients."""
        if self.A.grad is None or self.B.grad is None:
            return torch.zeros_like(self.deviation)
        left, right = torch.cat([self.B, self.B.grad], 1), torch.cat([self.A.grad, self.A])
        return self.scaling * ((left @ (right @ right.T)) * left).sum(1).clamp(min=0).sqrt()

    @classmethod
    @torch.no_grad()
    def step(cls, deltas, progress):
        for d in deltas:
            size = d.sigma * d.row_norms(d.site.weight) + d.beta * d.gradient_norms().square()
            d.deviation.copy_(size / len(size) ** 0.5)
