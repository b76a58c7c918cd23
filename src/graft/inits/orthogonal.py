"""Orthogonal initialisation: both factors are away from zero, their product is not."""

import torch

from ..core.delta import Paper
from ..core.errors import GraftError
from ..core.factored import Init


class Orthogonal(Init, name="orthogonal"):
    """A = Q_odd^T X / 10 and B = Y Q_even / 10, so that B A = 0: Q [rank, rank] is a random orthogonal matrix, Q_odd
    and Q_even its rows by turns, X [rank / 2, in] and Y [out, rank / 2] are normal.

    A [rank, in], B [out, rank]. Source: PEFT's `orthogonal_init`, which follows the post named below.
    """

    papers = (
        Paper(
            "Rethinking LoRA initialisation",
            "datta0",
            2024,
            "https://datta0.github.io/posts/rethink-lora-init/",
        ),
    )
    known = (
        "Another author's test (https://aweers.de/blog/2025/lora-init) finds LoRA's random start better: it bears "
        "higher learning rates and ends at the lower loss."
    )

    def factors(self, site, rank, scaling):
        if rank % 2:
            raise GraftError(f"orthogonal: the rank must be even at {site.path}, not {rank}")
        Q = torch.linalg.qr(torch.randn(rank, rank, dtype=torch.float64)).Q.float()
        return Q[::2].T @ torch.randn(rank // 2, site.d_in) / 10, torch.randn(site.d_out, rank // 2) @ Q[1::2] / 10
