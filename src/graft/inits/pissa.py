"""PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models. Meng et al., 2024."""

from typing import Annotated

from ..core.delta import Paper
from ..core.factored import Init
from ..core.hyper import Range


class PiSSA(Init, name="pissa"):
    """W = U S V is split: A = (S_r / s)^1/2 V_r and B = U_r (S_r / s)^1/2 of the `rank` largest singular values are
    trained, W - s B A is frozen.

    U_r [out, rank], S_r [rank], V_r [rank, in]; s is the method's scaling. Source: the paper and PEFT's `pissa_init`.
    """

    papers = (
        Paper(
            "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models",
            "Meng, Wang, Zhang",
            2024,
            "https://arxiv.org/abs/2404.02948",
        ),
    )
    known = (
        "PEFT's documentation, after the authors: faster convergence and better results than with LoRA's random start, "
        "and a smaller error on quantised bases."
    )
    taken_off = True

    def __init__(
        self, *, niter: Annotated[int | None, "iterations of a fast, random SVD; left out, exact", Range(1)] = None
    ):
        self.niter = niter

    def factors(self, site, rank, scaling):
        U, S, V = self.triplets(site, site.weight, rank, self.niter)
        root = (S / scaling).sqrt()
        return root[:, None] * V, U * root
