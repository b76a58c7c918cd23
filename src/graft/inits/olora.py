"""OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models. Büyükakyüz, 2024."""

import torch

from ..core.delta import Paper
from ..core.factored import Init, wide


class OLoRA(Init, name="olora"):
    """W = Q R with Q [out, k] orthonormal: B = Q[:, :rank] and A = R[:rank] are trained, W - s B A is frozen.

    A [rank, in], B [out, rank]; s is the method's scaling. Source: the paper and PEFT's `olora_init`.
    """

    papers = (
        Paper(
            "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models",
            "Büyükakyüz",
            2024,
            "https://arxiv.org/abs/2406.01775",
        ),
    )
    known = (
        "PEFT's documentation, after the authors: faster and more stable convergence than LoRA's random start, and "
        "better results."
    )
    taken_off = True

    def factors(self, site, rank, scaling):
        self.check_rank(site, rank, min(site.weight.shape))
        Q, R = torch.linalg.qr(wide(site.weight))
        return R[:rank], Q[:, :rank]
