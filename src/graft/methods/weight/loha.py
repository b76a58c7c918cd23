"""LoHa: Low-rank Hadamard product, from FedPara (Hyeon-Woo et al., 2021) and LyCORIS (Yeh et al., 2023)."""

from typing import Annotated

import torch
from torch import nn

from ...core.delta import Delta, Paper
from ...core.formats.lycoris import LowRank, tucker
from ...core.formats.peft import As, Peft, zero_padded
from ...core.hyper import Range


class _Hadamard(LowRank):
    """LyCORIS's LoHa, at a convolution perhaps with both products in Tucker form."""

    def plain(self, site, found):
        for i in "12":
            core = found.pop(f"hada_t{i}", None)
            if core is not None:
                found[f"hada_w{i}_a"] = found[f"hada_w{i}_a"].T
                found[f"hada_w{i}_b"] = tucker(core, found[f"hada_w{i}_b"])
        return found


class LoHa(Delta, name="loha"):
    """W' = W + s (B1 A1) ∘ (B2 A2), of rank up to rank^2, with s = alpha / rank and ∘ the entrywise product.

    A1, A2 [rank, in] and B1 [out, rank] are random (normal, of deviation 1, 1 and 0.1 as in LyCORIS), B2 [out, rank]
    is zero, so that the adapted model starts as the base. The entrywise product of two products is again a product,

        (B1 A1) ∘ (B2 A2) = B A    with B[o, (p, q)] = B1[o, p] B2[o, q] and A[(p, q), i] = A1[p, i] A2[q, i],

    (the Khatri-Rao products A [rank^2, in] and B [out, rank^2]), which acts on activations as LoRA does. Where A and B
    are together larger than half the matrix [out, in], the matrix is formed, and formed again for backward.
    """

    papers = (
        Paper(
            "FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning",
            "Hyeon-Woo, Ye-Bin, Oh",
            2021,
            "https://arxiv.org/abs/2108.06098",
        ),
        Paper(
            "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation",
            "Yeh et al.",
            2023,
            "https://arxiv.org/abs/2309.14859",
        ),
    )
    small = dict(rank=2)
    peft = Peft(
        "LOHA",
        {
            "B1": As("hada_w1_a", zero_padded, zero_padded),
            "A1": As("hada_w1_b"),
            "B2": As("hada_w2_a"),
            "A2": As("hada_w2_b"),
        },
        config={"r": "rank", "alpha": "alpha"},
        patterns={"rank_pattern": "r", "alpha_pattern": "alpha"},
        neutral=frozenset({"rank_dropout", "module_dropout", "use_effective_conv2d", "init_weights"}),
        hosts=("Linear", "Conv1d", "Conv2d"),
    )
    lycoris = _Hadamard(
        {"B1": As("hada_w1_a"), "A1": As("hada_w1_b"), "B2": As("hada_w2_a"), "A2": As("hada_w2_b")},
        also=frozenset({"hada_t1", "hada_t2"}),
        rank="A1",
    )

    def __init__(
        self,
        site,
        *,
        rank: Annotated[int, "rank of each of the two products", Range(1)] = 8,
        alpha: Annotated[float, "numerator of the scaling s"] = 8.0,
    ):
        super().__init__(site)
        self.A1 = nn.Parameter(torch.randn(rank, site.d_in))
        self.B1 = nn.Parameter(0.1 * torch.randn(site.d_out, rank))
        self.A2 = nn.Parameter(torch.randn(rank, site.d_in))
        self.B2 = nn.Parameter(torch.zeros(site.d_out, rank))
        self.scaling = alpha / rank
        self.dense = 2 * rank**2 * (site.d_in + site.d_out) > site.d_in * site.d_out

    def forward(self, inner, x):
        y = inner(x)
        if self.dense:
            B1 = self.scaling * self.B1
            return y + self.site.apply_formed(x, hadamard, B1, None, self.A1, self.B2, self.A2)
        A = (self.A1[:, None] * self.A2).flatten(0, 1)
        B = (self.scaling * self.B1[:, :, None] * self.B2[:, None]).flatten(1)
        return self.site.add_up(y, self.site.down(x, A), B)

    def weight(self, w):
        return w + hadamard(self.scaling * self.B1, self.A1, self.B2, self.A2)


def hadamard(B1, A1, B2, A2):
    """(B1 A1) ∘ (B2 A2)."""
    return (B1 @ A1) * (B2 @ A2)
