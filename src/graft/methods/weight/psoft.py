"""PSOFT: Efficient Orthogonal Fine-Tuning with Principal Subspace Adaptation. Wu, Hu, Min, Wang, 2025."""

from typing import Annotated

import torch
from torch import Tensor, nn

from ...core.delta import Paper
from ...core.errors import GraftError
from ...core.hyper import Range
from .orthogonal import cayley, skew
from .spectrum import Spectral


class PSOFT(Spectral, name="psoft"):
    """W' = W + U diag(s) (diag(b) R diag(a) - I) V: the `rank` principal components of W are turned among themselves.

    U [out, rank], s and V [rank, in] are the largest singular triplets of W, made from W and not saved;
    R = (I + Q) (I - Q)^-1 is orthogonal, Q [rank, rank] skew-symmetric with the upper triangle `triangle`
    [rank (rank - 1) / 2], zero at first. With `scales` the inputs and outputs of R are scaled by a and b [rank], one at
    first. Formulas and defaults as in Hugging Face PEFT.
    """

    papers = (
        Paper(
            "Efficient Orthogonal Fine-Tuning with Principal Subspace Adaptation",
            "Wu, Hu, Min, Wang",
            2025,
            "https://arxiv.org/abs/2505.11235",
        ),
    )
    known = (
        "Its authors made it because orthogonal methods cost much in parameters, memory and time, and report a "
        "practical balance of these with quality over 35 tasks of language and vision."
    )
    small = dict(rank=3)
    peft = "it turns in the basis of a decomposition whose signs differ from run to run and are not saved"
    upper: Tensor

    def __init__(
        self,
        site,
        *,
        rank: Annotated[int, "principal components that are turned", Range(2)] = 32,
        scales: Annotated[bool, "train a and b, which relax the orthogonality"] = True,
    ):
        super().__init__(site, rank)
        k = len(self.s)
        if k < 2:
            raise GraftError(f"psoft: {site.path} has one singular triplet, which cannot be turned")
        self.triangle = nn.Parameter(torch.zeros(k * (k - 1) // 2))
        self.a, self.b = (nn.Parameter(torch.ones(k)) if scales else None for _ in range(2))
        self.register_buffer("upper", torch.triu_indices(k, k, 1), persistent=False)

    def core(self):
        """diag(b) R diag(a)."""
        with torch.autocast(self.triangle.device.type, enabled=False):
            R = cayley(skew(self.triangle, self.upper, len(self.s)))
        return R if self.a is None or self.b is None else self.b[:, None] * R * self.a

    def factors(self):
        eye = torch.eye(len(self.s), dtype=self.s.dtype, device=self.s.device)
        return self.V, (self.U * self.s) @ (self.core() - eye)
