"""Tied-LoRA: Enhancing Parameter Efficiency of LoRA with Weight Tying. Renduchintala et al., 2023."""

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import nn

from ...core.delta import Paper
from ...core.errors import GraftError
from ...core.hyper import Range
from .low_rank import LowRank
from .tied import Tied


def _kaiming(t):
    return nn.init.kaiming_uniform_(t, a=5**0.5)


class TiedLoRA(LowRank, name="tied_lora"):
    """W'_l = W_l + s diag(v_l) B diag(u_l) A for the sites l, with u_l [rank] and v_l [out] of each; s = alpha / rank.

    A [rank, in] and B [out, rank] are shared by the sites of one size [out, in], or each one's own if not `tied`.
    `train` says which of A, B, u and v are trained: "ABuv" is the whole method, "AB" without ties is LoRA, "uv" with
    ties is VeRA (whose pair serves all sizes), "B" without ties LoRA with a frozen A. What is frozen of A and B is
    drawn again from the adapter's seed, and not saved; what is frozen of u and v is one.

    The formula and the grid are the paper's. How a grid point starts is not, for its text could not be read: A is
    Kaiming uniform as in LoRA, u one, and the update is zero through B where that is trained, else, as in VeRA, through
    v beside a random B.
    """

    papers = (
        Paper(
            "Tied-LoRA: Enhancing Parameter Efficiency of LoRA with Weight Tying",
            "Renduchintala, Konuk, Kuchaiev",
            2023,
            "https://arxiv.org/abs/2311.09578",
        ),
    )
    known = (
        "Its authors report, for one choice of what is tied and trained, results comparable to LoRA's on several tasks "
        "with 13 % of its parameters."
    )
    by_factors = False  # they would be copies of A and B at each site
    small = dict(rank=2)

    @classmethod
    def share(cls, sites, *, tied, **hyper):
        return cls._pair(sites, **hyper) if tied else None

    @staticmethod
    def _pair(sites, *, rank, train, **_):
        return Tied(sites, rank, _kaiming, nn.init.zeros_ if "B" in train else _kaiming, train)

    def __init__(
        self,
        site,
        shared=None,
        *,
        rank: Annotated[int, "rank of the update", Range(1)] = 8,
        alpha: Annotated[float, "numerator of the scaling s"] = 16.0,
        dropout: Annotated[float, "probability of dropping an input of the update", Range(0, below=1)] = 0.0,
        train: Annotated[str, "which of A, B, u and v are trained"] = "ABuv",
        tied: Annotated[bool, "whether sites of one size share A and B"] = True,
    ):
        super().__init__(site, shared)
        if set(train) - set("ABuv") or len(set(train)) < len(train) or not set(train) & set("Bv"):
            raise GraftError(f"tied_lora: train names some of A, B, u and v, B or v among them, not {train!r}")
        if shared is None:
            self.pair = self._pair([site], rank=rank, train=train)
        elif (given := "".join(n for n in "AB" if n in train)) != shared.trained:
            raise GraftError(
                f"tied_lora: train must agree on A and B at all sites, which share them; {site.path} trains "
                f"{given or 'neither'}, the first one {shared.trained or 'neither'}"
            )
        (shared or self.pair).at(site, self.name, rank)
        self.u = nn.Parameter(torch.ones(rank)) if "u" in train else None
        self.v = nn.Parameter(torch.full((site.d_out,), float("B" in train))) if "v" in train else None
        self.scaling, self.dropout = alpha / rank, dropout

    def prepare(self, inner):
        return *(self.pair if self.shared is None else self.shared).of(self.site), self.u, self.v

    def factors(self):
        A, B, u, v = self.prepare(None)
        A = A if u is None else u[:, None] * A
        return A, self.scaling * (B if v is None else v[:, None] * B)

    def act(self, inner, x, A, B, u, v):
        z = F.dropout(x, self.dropout, self.training) if self.dropout else x
        h = self.site.scale(self.site.down(z, A), self.scaling if u is None else self.scaling * u)
        if v is None:
            return self.site.add_up(inner(x), h, B)
        return inner(x) + self.site.scale(self.site.up(h, B), v)
