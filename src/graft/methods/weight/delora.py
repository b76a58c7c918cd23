"""DeLoRA: Decoupling Angles and Strength in Low-rank Adaptation. Bini et al., 2025."""

from typing import Annotated

import torch
from torch import Tensor, nn

from ...core.delta import Paper
from ...core.formats.peft import As, Peft
from ...core.hyper import Range
from .low_rank import LowRank

_LEAST = 1e-4  # the smallest norm that is divided by, as in PEFT


class _DeloraPeft(Peft):
    """PEFT stores the norms of the base's columns beside the update."""

    def site_out(self, delta):
        return super().site_out(delta) | {"delora_w_norm": delta.norms}

    def site_in(self, site, found, config):
        return {k: v for k, v in super().site_in(site, found, config).items() if k != "norms"}


class DeLoRA(LowRank, name="delora"):
    """W' = W + (strength / rank) sum over i of b_i a_i^T diag(n) / (||b_i|| ||a_i||), n [in] the norms of W's columns.

    A [rank, in] with rows a_i is random (Kaiming uniform), B [out, rank] with columns b_i is zero, so that the adapted
    model starts as the base, and the number `strength` is trained too. Angles and strength are apart: whatever A and B
    are, ||(W' - W) diag(n)^-1||_F <= |strength|. Norms below 1e-4 count as 1e-4, as in PEFT; n is taken from the base
    and not stored. Dropout falls on the input of the update only.
    """

    papers = (
        Paper(
            "Decoupling Angles and Strength in Low-rank Adaptation",
            "Bini, Girrbach, Akata",
            2025,
            "https://arxiv.org/abs/2503.18225",
        ),
    )
    known = (
        "Its authors report results equal to or better than those of other methods in subject-driven image generation, "
        "language understanding and instruction tuning, and less harm from unlucky hyperparameters and long training "
        "than LoRA takes."
    )
    hosts = ("linear", "conv")
    small = dict(rank=2)
    peft = _DeloraPeft(
        "DELORA",
        {
            "A": As("delora_A"),
            "B": As("delora_B"),
            "strength": As("delora_lambda"),
            "norms": As("delora_w_norm", optional=True),
        },
        config={"r": "rank", "delora_lambda": "strength", "module_dropout": "dropout"},
        patterns={"rank_pattern": "r", "lambda_pattern": "delora_lambda"},
        fixed={"bias": "none"},
        neutral=frozenset({"init_weights"}),
        hosts=("Linear",),
    )
    norms: Tensor

    def __init__(
        self,
        site,
        *,
        rank: Annotated[int, "rank of the update", Range(1)] = 8,
        strength: Annotated[float, "start of the bound of the update's norm", Range(0)] = 15.0,
        dropout: Annotated[float, "probability of dropping an input of the update", Range(0, below=1)] = 0.0,
    ):
        super().__init__(site)
        self.A = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(rank, site.d_in), a=5**0.5))
        self.B = nn.Parameter(torch.zeros(site.d_out, rank))
        self.strength = nn.Parameter(torch.full((1,), float(strength)))
        self.register_buffer("norms", torch.linalg.vector_norm(site.weight.detach().float(), dim=0), persistent=False)
        self.dropout = dropout

    def factors(self):
        lengths = self.A.norm(dim=1).clamp_min(_LEAST) * self.B.norm(dim=0).clamp_min(_LEAST)
        return self.A * self.norms, self.B * (self.strength / len(self.A) / lengths)
