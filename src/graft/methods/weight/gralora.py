"""GraLoRA: Granular Low-Rank Adaptation for Parameter-Efficient Fine-Tuning. Jung et al., 2025."""

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import nn

from ...core.delta import Delta, Paper
from ...core.errors import GraftError
from ...core.formats.peft import As, Peft
from ...core.hyper import Range


class GraLoRA(Delta, name="gralora"):
    """W' = W + s D, D cut into blocks x blocks parts [out / blocks, in / blocks], each of rank r = rank / blocks.

    Part (j, n), from input block n to output block j, is B[j, n r : (n + 1) r]^T A[n, :, j r : (j + 1) r]^T, with
    A [blocks, in / blocks, rank] random (Kaiming uniform) and B [blocks, rank, out / blocks] zero, so that the adapted
    model starts as the base. It has the parameters of LoRA of this rank, and a change of up to `blocks` times the rank.
    With `hybrid_rank` > 0 the product of B0 [out, hybrid_rank] (zero) and A0 [hybrid_rank, in] is added to D.
    s = alpha / (rank + hybrid_rank). Dropout falls on the input of the update only.
    """

    papers = (
        Paper(
            "GraLoRA: Granular Low-Rank Adaptation for Parameter-Efficient Fine-Tuning",
            "Jung et al.",
            2025,
            "https://arxiv.org/abs/2505.20355",
        ),
    )
    known = (
        "Its authors report better results than LoRA on code, reasoning, language understanding and image generation, "
        "by up to 8.5 points of Pass@1 on HumanEval+. It is made for high ranks, at which they find that LoRA "
        "overfits."
    )
    hosts = ("linear",)
    passes_x = True
    small = dict(rank=4)
    peft = Peft(
        "GRALORA",
        {
            "A": As("gralora_A"),
            "B": As("gralora_B"),
            "A0": As("gralora_A_general.weight", optional=True),
            "B0": As("gralora_B_general.weight", optional=True),
        },
        config={
            "r": "rank",
            "alpha": "alpha",
            "gralora_k": "blocks",
            "hybrid_r": "hybrid_rank",
            "gralora_dropout": "dropout",
        },
        fixed={"bias": "none"},
        neutral=frozenset({"init_weights"}),
        hosts=("Linear", "Conv1D"),
    )

    def __init__(
        self,
        site,
        *,
        rank: Annotated[int, "rank of LoRA with as many parameters; a multiple of `blocks`", Range(1)] = 32,
        alpha: Annotated[float, "numerator of the scaling s"] = 64.0,
        blocks: Annotated[int, "into how many parts each side is cut; the paper: 2, from rank 64 on 4", Range(1)] = 2,
        hybrid_rank: Annotated[int, "rank of the LoRA over the whole matrix beside it", Range(0)] = 0,
        dropout: Annotated[float, "probability of dropping an input of the update", Range(0, below=1)] = 0.0,
    ):
        super().__init__(site)
        for what, size in (("rank", rank), ("the input size", site.d_in), ("the output size", site.d_out)):
            if size % blocks:
                raise GraftError(f"gralora: blocks {blocks} must divide {what} {size} at {site.path}")
        self.A = nn.Parameter(_uniform(blocks, rank, site.d_in // blocks).mT.contiguous())
        self.B = nn.Parameter(torch.zeros(blocks, rank, site.d_out // blocks))
        self.A0 = nn.Parameter(_uniform(hybrid_rank, site.d_in)) if hybrid_rank else None
        self.B0 = nn.Parameter(torch.zeros(site.d_out, hybrid_rank)) if hybrid_rank else None
        self.blocks, self.scaling, self.dropout = blocks, alpha / (rank + hybrid_rank), dropout

    def prepare(self, inner):
        return self.A, self.scaling * self.B, self.A0, None if self.B0 is None else self.scaling * self.B0

    def act(self, inner, x, A, B, A0=None, B0=None):
        z = F.dropout(x, self.dropout, self.training) if self.dropout else x
        h = torch.einsum("...ni,nir->...nr", z.unflatten(-1, (self.blocks, -1)), A.to(z.dtype))
        h = h.unflatten(-1, (self.blocks, -1)).transpose(-3, -2).flatten(-2)  # from [n, (j, r)] to [j, (n, r)]
        y = inner(x)
        y = y + torch.einsum("...jr,jro->...jo", h, B.to(h.dtype)).flatten(-2).to(y.dtype)
        return y if A0 is None or B0 is None else self.site.add_up(y, self.site.down(z, A0), B0)

    def weight(self, w):
        A = self.A.unflatten(-1, (self.blocks, -1))  # [n, i, j, r]
        B = self.B.unflatten(1, (self.blocks, -1))  # [j, n, r, o]
        change = torch.einsum("nijr,jnro->joni", A, B).reshape(w.shape)
        if self.A0 is not None and self.B0 is not None:
            change = change + self.B0 @ self.A0
        return w + self.scaling * change


def _uniform(*shape: int) -> torch.Tensor:
    """Kaiming uniform over the last axis, matrix by matrix."""
    return torch.empty(shape).uniform_(-(shape[-1] ** -0.5), shape[-1] ** -0.5)
