"""Chain of LoRA (COLA): Efficient Fine-tuning of Language Models via Residual Learning. Xia et al., 2024."""

from typing import Annotated

import torch
from torch import Tensor, nn

from ...core.delta import Fresh, Paper
from ...core.hyper import Range
from .low_rank import LowRank


class COLA(LowRank, name="cola"):
    """W' = W + s (B_1 A_1 + ... + B_n A_n), trained one link after the other, n = links; s = alpha / rank.

    Training is divided evenly among the links. A [rank, in] is random (Kaiming uniform) and B [out, rank] zero at the
    beginning of each; at its end they move into past_A [(links - 1) rank, in] and past_B [out, (links - 1) rank], which
    stay, a new link begins, and the optimizer forgets the old one. As many parameters are trained at any time as in one
    LoRA. The paper adds finished links to W; here W stays, and they can be taken off again.

    The change may have the rank links times rank. The A of a later link is drawn from how far training is, so that all
    processes draw the same. The steps (tune, merge, begin anew with A, B and the optimizer) are those of the paper's
    abstract; its text could not be read, and no code of it was found: the number of links is a choice.
    """

    papers = (
        Paper(
            "Chain of LoRA: Efficient Fine-tuning of Language Models via Residual Learning",
            "Xia, Qin, Hazan",
            2024,
            "https://arxiv.org/abs/2401.04151",
        ),
    )
    known = (
        "Its authors report better results than LoRA on seven tasks with OPT and Llama-2, at no further cost in "
        "computation or memory."
    )
    ups = ("B",)
    small = dict(rank=2, links=2)
    past_A: Tensor
    past_B: Tensor
    link: Tensor

    def __init__(
        self,
        site,
        *,
        rank: Annotated[int, "rank of a link", Range(1)] = 8,
        links: Annotated[int, "number of links", Range(2)] = 3,
        alpha: Annotated[float, "numerator of the scaling s"] = 16.0,
        dropout: Annotated[float, "probability of dropping an input of the update", Range(0, below=1)] = 0.0,
    ):
        super().__init__(site)
        self.A = nn.Parameter(torch.empty(rank, site.d_in))
        self.B = nn.Parameter(torch.zeros(site.d_out, rank))
        nn.init.kaiming_uniform_(self.A, a=5**0.5)
        self.register_buffer("past_A", torch.zeros((links - 1) * rank, site.d_in))
        self.register_buffer("past_B", torch.zeros(site.d_out, (links - 1) * rank))
        self.register_buffer("link", torch.tensor(0))
        self.links, self.scaling, self.dropout = links, alpha / rank, dropout

    def factors(self):
        return torch.cat([self.A, self.past_A]), self.scaling * torch.cat([self.B, self.past_B], 1)

    def begin(self, link: int, generator: torch.Generator) -> Fresh:
        """Keep the present link and begin the next one."""
        rank = len(self.A)
        own = slice((link - 1) * rank, link * rank)
        self.past_A[own], self.past_B[:, own] = self.A, self.B
        bound = self.site.d_in**-0.5  # Kaiming's, drawn on the CPU in float32
        self.A.copy_(torch.empty(self.A.shape).uniform_(-bound, bound, generator=generator))
        self.B.zero_()
        self.link.fill_(link)
        return {self.A: None, self.B: None}

    @classmethod
    @torch.no_grad()
    def step(cls, deltas, progress):
        generator = torch.Generator().manual_seed(round(progress * 2**40))
        anew = {}
        for d in deltas:
            for link in range(int(d.link) + 1, min(int(progress * d.links + 1e-6), d.links - 1) + 1):
                anew |= d.begin(link, generator)
        return anew
