"""Spectral Adapter: Fine-Tuning in Spectral Space. Zhang, Pilanci, 2024."""

from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from ...core.delta import Paper
from ...core.errors import GraftError
from ...core.hyper import Range
from .orthogonal import cayley, skew
from .spectrum import Spectral


class SpectralAdapter(Spectral, name="spectral_adapter"):
    """Of W = U diag(s) V the `rank` largest singular triplets U [out, rank], s, V [rank, in] are tuned, the rest stays:

        additive      W' = W + (U + P) diag(s) (V + Q) - U diag(s) V, P [out, rank] and Q [rank, in] trained from zero:
                      as many parameters as LoRA's, for a change of twice its rank
        rotational    W' = W + U (R_u diag(s) R_v^T - diag(s)) V with rotations R = (I + S) (I - S)^-1 of the
                      skew-symmetric S [rank, rank] whose upper triangles `left` and `right` [rank (rank - 1) / 2] are
                      trained from zero

    Computed as y + B (A x), with U, s and V made from W and not saved. `first` leaves out the largest triplets:
    adapters of different ones change different directions of W, and add up without collision.

    The formulas are those of the authors' code (github.com/pilancilab/spectral_adapter), which also scales s in its
    rotational variant; the paper has no default for the rank.
    """

    papers = (
        Paper(
            "Spectral Adapter: Fine-Tuning in Spectral Space",
            "Zhang, Pilanci",
            2024,
            "https://arxiv.org/abs/2405.13952",
        ),
    )
    known = (
        "Its authors report better results for the number of parameters than low-rank adapters have, and that several "
        "of them fuse more easily."
    )
    small = dict(rank=3)
    upper: Tensor

    def __init__(
        self,
        site,
        *,
        rank: Annotated[int, "singular triplets that are tuned", Range(1)] = 8,
        mode: Annotated[Literal["additive", "rotational"], "how they are tuned"] = "additive",
        first: Annotated[int, "largest triplets that are left out", Range(0)] = 0,
    ):
        super().__init__(site, rank, first)
        k = len(self.s)
        if k < 1 + (mode == "rotational"):
            raise GraftError(
                f"spectral_adapter: first {first} and rank {rank} leave too few of the {min(site.d_in, site.d_out)} "
                f"singular triplets of {site.path}; rotational needs two, additive one"
            )
        self.P = self.Q = self.left = self.right = None
        if mode == "additive":
            self.P, self.Q = nn.Parameter(torch.zeros(site.d_out, k)), nn.Parameter(torch.zeros(k, site.d_in))
        else:
            self.left, self.right = (nn.Parameter(torch.zeros(k * (k - 1) // 2)) for _ in range(2))
        self.register_buffer("upper", torch.triu_indices(k, k, 1), persistent=False)

    def rotation(self, triangle):
        with torch.autocast(triangle.device.type, enabled=False):
            return cayley(skew(triangle, self.upper, len(self.s)))

    def factors(self):
        if self.P is not None and self.Q is not None:
            return torch.cat([self.V + self.Q, self.Q]), torch.cat([self.P, self.U], 1) * self.s.repeat(2)
        core = self.rotation(self.left) * self.s @ self.rotation(self.right).mT - self.s.diag()
        return self.V, self.U @ core
