"""DoRA of dynamic rank: Enhancing Parameter-Efficient Fine-Tuning with Dynamic Rank Distribution. Mao et al., 2024."""

from typing import Annotated

import torch
from torch import Tensor, nn

from ...core.delta import Paper
from ...core.hyper import Range
from .triplets import Triplets


class DyDoRA(Triplets, name="dydora"):
    """W' = W + s P diag(e * keep) Q with s = alpha / rank: the other DoRA, which distributes ranks dynamically.

    P [out, rank] and Q [rank, in] are random (Kaiming uniform) and e [rank] zero, so that the adapted model starts as
    the base. `keep` [rank] of zeros and ones leaves the most important components dW_i = e[i] P[:, i] Q[i] of all sites
    together. Important is ||dW_i|| / ||dW||, a component's share of the norm of its own site's change, smoothed:
    S <- beta S + (1 - beta) ||dW_i|| / (||dW|| + 1e-8). Both norms come from products of rank x rank.

    The number kept is rank a site for the share `warmup` of training, falls to target_rank as 1 - t^3 until the share
    `cooldown` is left, and is then fixed together with the choice. Until then a penalty holds the entries of a
    component even: gamma times the mean variance of the rows of Q and the columns of P.

    Formulas and defaults are those of the authors' code (github.com/MIkumikumi0116/DoRA), which chooses at every 100th
    step, here at each; alpha and gamma are those of its example.
    """

    papers = (
        Paper(
            "DoRA: Enhancing Parameter-Efficient Fine-Tuning with Dynamic Rank Distribution",
            "Mao et al.",
            2024,
            "https://arxiv.org/abs/2405.17357",
        ),
    )
    known = (
        "Its authors report results close to LoRA's and full fine-tuning's, and better ones than other methods for the "
        "same number of stored parameters."
    )
    small = dict(rank=3, target_rank=2)
    share_of_norm: Tensor
    choosing: Tensor

    def __init__(
        self,
        site,
        *,
        rank: Annotated[int, "rank at the start, 1.5 times the target in the paper", Range(1)] = 12,
        target_rank: Annotated[int, "mean rank at the end", Range(1)] = 8,
        alpha: Annotated[float, "numerator of the scaling s"] = 8.0,
        dropout: Annotated[float, "probability of dropping an input of the update", Range(0, below=1)] = 0.0,
        warmup: Annotated[float, "share of training before ranks fall", Range(0, below=1)] = 0.15,
        cooldown: Annotated[float, "share of training after ranks are settled", Range(0, below=1)] = 0.5,
        beta: Annotated[float, "smoothing of the importance", Range(0, below=1)] = 0.9,
        gamma: Annotated[float, "weight of the penalty", Range(0)] = 0.1,
    ):
        P, Q = (nn.init.kaiming_uniform_(torch.empty(shape)) for shape in ((site.d_out, rank), (rank, site.d_in)))
        super().__init__(site, P, Q, target_rank, alpha, dropout, warmup, cooldown)
        self.register_buffer("share_of_norm", torch.zeros(rank))
        self.register_buffer("choosing", torch.tensor(1.0))
        self.beta, self.gamma = beta, gamma

    def observe(self):
        squares = self.e[:, None] * (self.P.T @ self.P) * (self.Q @ self.Q.T) * self.e  # <dW_i, dW_j>
        whole = squares.sum().clamp(min=0).sqrt()
        self.share_of_norm.lerp_(squares.diagonal().sqrt() / (whole + 1e-8), 1 - self.beta)

    def importance(self):
        return self.share_of_norm

    @staticmethod
    def left(phase):
        return 1 - phase**3

    @classmethod
    def step(cls, deltas, progress):
        super().step(deltas, progress)
        for d in deltas:
            d.choosing.fill_(float(progress < 1 - d.cooldown))

    @classmethod
    def penalty(cls, deltas):
        variances = torch.cat([_variance(m) for d in deltas for m in (d.P.T, d.Q)])
        return deltas[0].gamma * deltas[0].choosing * variances.mean()


def _variance(rows: Tensor) -> Tensor:
    return rows.var(1, correction=min(1, rows.shape[1] - 1))
