"""OFT: Controlling Text-to-Image Diffusion by Orthogonal Finetuning. Qiu et al., 2023. In its input-centric form."""

from typing import Annotated

import torch
from torch import Tensor, nn

from ...core.delta import Delta, Paper
from ...core.errors import GraftError
from ...core.hyper import Range


class OFT(Delta, name="oft"):
    """W' = W R^T with R block-diagonal and orthogonal, computed as f(x R): the inputs are turned, W' is never formed.

    R_n = (I + Q_n) (I - Q_n)^-1 is the Cayley transform of the skew-symmetric Q_n [block, block], whose upper
    triangles are `triangles` [in / block, block (block - 1) / 2], zero at first. With `terms` = k it is
    (I + Q_n) (I + Q_n + ... + Q_n^k), the Cayley-Neumann form of OFTv2, nearly orthogonal for small Q_n.
    PEFT's default of five terms there is k = 3 here; its exact variant has the opposite sign of Q.
    """

    papers = (
        Paper(
            "Controlling Text-to-Image Diffusion by Orthogonal Finetuning",
            "Qiu et al.",
            2023,
            "https://arxiv.org/abs/2306.07280",
        ),
        Paper("Orthogonal Finetuning Made Scalable", "Qiu et al.", 2025, "https://arxiv.org/abs/2506.19847"),
    )
    hosts = ("linear", "conv")
    small = dict(block=4)
    upper: Tensor

    def __init__(
        self,
        site,
        *,
        block: Annotated[int, "side of the orthogonal blocks", Range(2)] = 32,
        terms: Annotated[int | None, "powers of Q in the Neumann series; none: the exact inverse", Range(1)] = None,
    ):
        super().__init__(site)
        if site.d_in % block:
            raise GraftError(f"oft: block {block} must divide the input size {site.d_in} of {site.path}")
        self.triangles = nn.Parameter(torch.zeros(site.d_in // block, block * (block - 1) // 2))
        self.register_buffer("upper", torch.triu_indices(block, block, 1), persistent=False)
        self.block, self.terms = block, terms

    def rotation(self):
        """R [in / block, block, block]."""
        q = self.triangles
        with torch.autocast(q.device.type, enabled=False):
            Q = q.new_zeros(len(q), self.block, self.block)
            Q[:, self.upper[0], self.upper[1]] = q
            Q = Q - Q.mT
            eye = torch.eye(self.block, dtype=q.dtype, device=q.device)
            if self.terms is None:
                return 2 * torch.linalg.inv(eye - Q) - eye  # the same, and cheaper in backward than a solve
            series = eye + Q
            for _ in range(self.terms - 1):
                series = eye + Q @ series
            return series + Q @ series

    def forward(self, inner, x):
        if self.site.kind != "linear":  # the inputs of a convolution are patches, which overlap
            return super().forward(inner, x)
        return inner(_turned(x, self.rotation().to(x.dtype)))

    def weight(self, w):
        R = self.rotation()
        return _turned(w.to(torch.promote_types(w.dtype, R.dtype)), R.mT)


def _turned(x, R):
    """x R over the last axis, block by block."""
    return torch.einsum("...nc,ncd->...nd", x.unflatten(-1, (-1, R.shape[-1])), R).flatten(-2)
