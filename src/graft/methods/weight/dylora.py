"""DyLoRA: Parameter Efficient Tuning of Pre-trained Models using Dynamic Search-Free Low-Rank Adaptation."""

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.delta import Paper
from ...core.errors import GraftError
from ...core.hyper import Range
from .low_rank import LowRank


class DyLoRA(LowRank, name="dylora"):
    """W' = W + alpha / b B[:, :b] A[:b], where b is drawn anew at each step, evenly from least_rank ... rank.

    A [rank, in] is random (Kaiming uniform) and B [out, rank] zero, so that the adapted model starts as the base. All
    sites draw together. The leading rows and columns so learn to do without the others: outside of training b is
    `rank`, or whatever `delta.use(b)` says, without training again. If `frozen`, a step trains only the last of the b
    rows and columns (a variant of the paper, and what LyCORIS does).

    The draw depends on how far training is alone, so that all processes and a resumed run draw the same. The authors'
    code could not be read: the rule is the paper's abstract and LyCORIS's module for blocks of one row.
    """

    papers = (
        Paper(
            "DyLoRA: Parameter Efficient Tuning of Pre-trained Models using Dynamic Search-Free Low-Rank Adaptation",
            "Valipour et al.",
            2022,
            "https://arxiv.org/abs/2210.07558",
        ),
    )
    known = (
        "Its authors report training at least 4 to 7 times faster than LoRA with a search for its rank, and good "
        "results over a far wider range of ranks."
    )
    ups = ("B",)
    small = dict(rank=3)
    lycoris = "it saves a trained DyLoRA as a LoRA; graft.convert makes one of this"
    drawn: Tensor
    used: Tensor

    def __init__(
        self,
        site,
        *,
        rank: Annotated[int, "the largest rank", Range(1)] = 8,
        least_rank: Annotated[int, "the smallest rank that is drawn", Range(1)] = 1,
        alpha: Annotated[float, "numerator of the scaling alpha / b"] = 16.0,
        dropout: Annotated[float, "probability of dropping an input of the update", Range(0, below=1)] = 0.0,
        frozen: Annotated[bool, "train only the last row and column of those drawn"] = False,
    ):
        super().__init__(site)
        if least_rank > rank:
            raise GraftError(f"dylora: least_rank must be at most rank = {rank}, not {least_rank}")
        self.A = nn.Parameter(torch.empty(rank, site.d_in))
        self.B = nn.Parameter(torch.zeros(site.d_out, rank))
        nn.init.kaiming_uniform_(self.A, a=5**0.5)
        self.register_buffer("drawn", torch.tensor(rank))
        self.register_buffer("used", torch.tensor(rank))
        self.least_rank, self.alpha, self.dropout, self.frozen = least_rank, alpha, dropout, frozen

    def use(self, rank: int) -> None:
        """The rank from now on, but in training."""
        if not 1 <= rank <= len(self.A):
            raise GraftError(f"dylora: the rank of {self.site.path} is 1 to {len(self.A)}, not {rank}")
        self.used.fill_(rank)

    def gates(self) -> Tensor:
        """alpha / b for the first b of the rank, 0 for the others."""
        b = self.drawn if self.training else self.used
        return (torch.arange(len(self.A), device=b.device) < b) * (self.alpha / b.to(self.A.dtype))

    def own(self) -> tuple[Tensor, Tensor]:
        """A and B; of a frozen one in training gradients reach the last row and column of those drawn alone."""
        if not (self.frozen and self.training):
            return self.A, self.B
        last = torch.arange(len(self.A), device=self.A.device) == self.drawn - 1
        return torch.where(last[:, None], self.A, self.A.detach()), torch.where(last, self.B, self.B.detach())

    def factors(self):
        A, B = self.own()
        return A, B * self.gates()

    def prepare(self, inner):
        # Folded, the gates would keep one more [out, rank] for backward.
        return (*self.own(), self.gates()) if torch.is_grad_enabled() else self.factors()

    def act(self, inner, x, A, B, gates=None):
        z = F.dropout(x, self.dropout, self.training) if self.dropout else x
        h = self.site.down(z, A)
        return self.site.add_up(inner(x), h if gates is None else self.site.scale(h, gates), B)

    @classmethod
    def step(cls, deltas, progress):
        if progress >= 1:
            for d in deltas:
                d.drawn.copy_(d.used)  # beside others in training it is no longer trained
            return
        generator = torch.Generator().manual_seed(round(progress * 2**40))
        share = torch.rand((), generator=generator, dtype=torch.float64).item()
        for d in deltas:
            d.drawn.fill_(d.least_rank + int(share * (len(d.A) - d.least_rank + 1)))
