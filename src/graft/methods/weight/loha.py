"""LoHa: Low-rank Hadamard product, from FedPara (Hyeon-Woo et al., 2021) and LyCORIS (Yeh et al., 2023)."""

from typing import Annotated

import torch
from torch import Tensor, nn

from ...core.delta import Delta, Paper
from ...core.formats.lycoris import LowRank, check_size
from ...core.formats.peft import As, Peft, zero_padded
from ...core.hyper import Range
from ...core.sites.conv import tucker_form


def _turned(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of LyCORIS and PEFT, which in Tucker form hold B1 and B2 transposed; its own inverse."""
    names = ("hada_w1_a", "hada_w2_a") if "hada_t1" in found else ()
    return found | {name: found[name].T.contiguous() for name in names}


class _Hadamard(LowRank):
    """LyCORIS's LoHa, at a convolution perhaps with both products in Tucker form."""

    def write(self, delta):
        return _turned(super().write(delta))

    def read(self, site, found):
        for i in "12":
            if f"hada_t{i}" in found:
                core = found[f"hada_t{i}"]
                check_size(site, len(core), found[f"hada_w{i}_b"].shape[1], *core.shape[2:])
        hyper, own = super().read(site, _turned(found))
        return hyper | {"tucker": "core1" in own}, own


class _HadamardPeft(Peft):
    def site_out(self, delta):
        return _turned(super().site_out(delta))

    def site_in(self, site, found, config):
        return super().site_in(site, _turned(found), config)


class LoHa(Delta, name="loha"):
    """W' = W + s (B1 A1) ∘ (B2 A2), of rank up to rank^2, with s = alpha / rank and ∘ the entrywise product.

    A1, A2 [rank, in] and B1 [out, rank] are random (normal, of deviation 1, 1 and 0.1 as in LyCORIS), B2 [out, rank]
    is zero, so that the adapted model starts as the base. The entrywise product of two products is again a product,

        (B1 A1) ∘ (B2 A2) = B A    with B[o, (p, q)] = B1[o, p] B2[o, q] and A[(p, q), i] = A1[p, i] A2[q, i],

    (the Khatri-Rao products A [rank^2, in] and B [out, rank^2]), which acts on activations as LoRA does. Where A and B
    are together larger than half the matrix [out, in], the matrix is formed, and formed again for backward.

    With `tucker`, a kernel larger than 1 of a convolution takes the Tucker form: A1 and A2 [rank, channels] see single
    positions, and core1 and core2 [rank, rank, kernel ...] (normal, of deviation 0.1) make matrices [rank, in] of them.
    """

    core1: nn.Parameter | None
    core2: nn.Parameter | None
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
    known = (
        "The authors of FedPara, whose form of a whole layer it takes over, report comparable results with 3 to 10 "
        "times less communication in federated learning. The authors of LyCORIS, who apply it to text-to-image models, "
        "give no figures in their abstract."
    )
    passes_x = True
    small = dict(rank=2)
    peft = _HadamardPeft(
        "LOHA",
        {
            "B1": As("hada_w1_a", zero_padded, zero_padded),
            "A1": As("hada_w1_b"),
            "B2": As("hada_w2_a"),
            "A2": As("hada_w2_b"),
            "core1": As("hada_t1", optional=True),
            "core2": As("hada_t2", optional=True),
        },
        config={"r": "rank", "alpha": "alpha", "use_effective_conv2d": "tucker"},
        defaults={"use_effective_conv2d": False},
        patterns={"rank_pattern": "r", "alpha_pattern": "alpha"},
        neutral=frozenset({"rank_dropout", "module_dropout", "init_weights"}),
        hosts=("Linear", "Conv1d", "Conv2d"),
    )
    lycoris = _Hadamard(
        {
            "B1": As("hada_w1_a"),
            "A1": As("hada_w1_b"),
            "B2": As("hada_w2_a"),
            "A2": As("hada_w2_b"),
            "core1": As("hada_t1", optional=True),
            "core2": As("hada_t2", optional=True),
        },
        rank="A1",
    )

    def __init__(
        self,
        site,
        *,
        rank: Annotated[int, "rank of each of the two products", Range(1)] = 8,
        alpha: Annotated[float, "numerator of the scaling s"] = 8.0,
        tucker: Annotated[bool, "on kernels of convolutions, take the Tucker form"] = False,
    ):
        super().__init__(site)
        tucker = tucker and site.taps > 1
        width = site.d_in // site.taps if tucker else site.d_in
        self.A1 = nn.Parameter(torch.randn(rank, width))
        self.B1 = nn.Parameter(0.1 * torch.randn(site.d_out, rank))
        self.A2 = nn.Parameter(torch.randn(rank, width))
        self.B2 = nn.Parameter(torch.zeros(site.d_out, rank))
        for name in ("core1", "core2"):
            core = nn.Parameter(0.1 * torch.randn(rank, rank, *site.module.kernel_size)) if tucker else None
            self.register_parameter(name, core)
        self.scaling = alpha / rank
        self.dense = 2 * rank**2 * (site.d_in + site.d_out) > site.d_in * site.d_out

    def downs(self):
        """A1 and A2 [rank, in], multiplied out where they are in Tucker form."""
        if self.core1 is None or self.core2 is None:
            return self.A1, self.A2
        return tucker_form(self.core1, self.A1), tucker_form(self.core2, self.A2)

    def factors(self):
        if self.dense:
            return None
        A1, A2 = self.downs()
        A = (A1[:, None] * A2).flatten(0, 1)
        return A, (self.scaling * self.B1[:, :, None] * self.B2[:, None]).flatten(1)

    def prepare(self, inner):
        if factors := self.factors():
            return factors
        A1, A2 = self.downs()
        return self.scaling * self.B1, A1, self.B2, A2

    def act(self, inner, x, *prepared):
        if self.dense:
            B1, *rest = prepared
            return inner(x) + self.site.apply_formed(x, hadamard, B1, None, *rest)
        A, B = prepared
        return self.site.add_up(inner(x), self.site.down(x, A), B)

    def weight(self, w):
        A1, A2 = self.downs()
        return w + hadamard(self.scaling * self.B1, A1, self.B2, A2)


def hadamard(B1, A1, B2, A2):
    """(B1 A1) ∘ (B2 A2)."""
    return (B1 @ A1) * (B2 @ A2)
