"""CorDA: Context-Oriented Decomposition Adaptation of Large Language Models. Yang et al., 2024."""

from typing import Annotated, Literal

import torch

from ..core.delta import Paper
from ..core.factored import Init, wide


class CorDA(Init, name="corda"):
    """W C = U S V with C [in, in] the covariance x x^T of the module's inputs, so that W = U S (V C^-1):
    A = (S / s)^1/2 V C^-1 and B = U (S / s)^1/2 of `rank` of the triplets are trained, W - s B A is frozen.

    In the mode "instruction" these are the largest: C comes from the task, whose main directions are trained. In the
    mode "knowledge" they are the smallest: C comes from what is to be kept, which stays in the frozen part.
    C is damped by 0.01 of the mean of its diagonal, and by twice as much again until ||C C^-1 - I||_F < 0.05.

    A [rank, in], B [out, rank]; s is the method's scaling. Source: the paper, the authors' `decompose_to_adapter`
    (iboing/CorDA), also for the unit of C, which decides how the product is shared between A and B.
    """

    papers = (
        Paper(
            "CorDA: Context-Oriented Decomposition Adaptation of Large Language Models",
            "Yang et al.",
            2024,
            "https://arxiv.org/abs/2406.05223",
        ),
    )
    known = (
        "Its authors report better results than LoRA and full fine-tuning in the mode `instruction`, and less "
        "forgetting in the mode `knowledge`."
    )
    needs = ("input_covariance",)
    hosts = ("linear",)
    taken_off = True

    def __init__(
        self,
        *,
        mode: Annotated[Literal["instruction", "knowledge"], "train the largest or the smallest"] = "instruction",
    ):
        self.mode = mode

    def factors(self, site, rank, scaling):
        w, (C, inverse) = wide(site.weight), damped(wide(site.stats["input_covariance"]))
        self.check_rank(site, rank, min(w.shape))
        U, S, V = torch.linalg.svd(w @ C.to(w), full_matrices=False)
        V = V @ inverse.to(w)
        chosen = slice(rank) if self.mode == "instruction" else slice(-rank, None)
        root = (S[chosen] / scaling).sqrt()
        return root[:, None] * V[chosen], U[:, chosen] * root


def damped(C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """C with so much on its diagonal that its inverse, which comes with it, is sound."""
    one, damp = torch.eye(len(C), dtype=C.dtype, device=C.device), 0.01
    while True:
        fixed = C + damp * C.diagonal().mean() * one
        inverse = torch.linalg.inv(fixed)
        if torch.dist(fixed @ inverse, one) < 0.05:
            return fixed, inverse
        damp *= 2
