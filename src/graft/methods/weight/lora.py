"""LoRA: Low-Rank Adaptation of Large Language Models. Hu et al., 2021."""

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import nn

from ...core.delta import Paper
from ...core.errors import GraftError
from ...core.factored import RANDOM, Factored, Start
from ...core.formats import OWN
from ...core.formats.adapter_hub import LoraHub
from ...core.formats.lycoris import LowRank, check_size, filters, matrix, point
from ...core.formats.peft import As, Peft, to_input_kernel, to_matrix, to_point_kernel
from ...core.hyper import Range
from ...core.sites.conv import tucker_form


def _changes_base(config: dict) -> str | None:
    """PEFT's initialisations that take the update's start out of the base's weights."""
    init = config.get("init_lora_weights", True)
    if init in (True, False, None, "gaussian", "orthogonal", "eva"):
        return None
    return (
        f"init_lora_weights={init!r} changed the base's weights; save it with PEFT's "
        f"path_initial_model_for_weight_conversion first, which makes a plain LoRA of it"
    )


class LoCon(LowRank):
    """LyCORIS's LoRA, at a convolution perhaps in Tucker form: up, a core in the middle, and down."""

    def read(self, site, found):
        core = found.get("lora_mid.weight")
        if core is not None:
            check_size(site, len(core), found["lora_down.weight"].shape[1], *core.shape[2:])
        hyper, own = super().read(site, found)
        return hyper | {"tucker": core is not None}, own


class _LoraHub(LoraHub):
    def write_config(self, deltas, homes):
        alphas = {d.scaling * len(d.A) for d in deltas.values()}
        if len(alphas) > 1:
            raise GraftError(f"`adapters` has one alpha for all modules, this adapter several: {OWN}")
        return {"alpha": alphas.pop()}

    def read_config(self, config, state):
        return {"alpha": float(config["alpha"])}


class LoRA(Factored, name="lora"):
    """W' = W + s B A, computed as y + s (x A^T) B^T, with s = alpha / rank, or alpha / sqrt(rank) if `rslora`.

    A [rank, in] is random (Kaiming uniform) and B [out, rank] zero, so that the adapted model starts as the base.
    Dropout falls on the input of the update only. With `bias`, b' = b + s c, and c [out] starts at zero.

    On convolutions this is LyCORIS's LoCon. With `tucker`, a kernel larger than 1 takes its Tucker form, of fewer
    parameters: A [rank, channels] sees single positions, and `core` [rank, rank, kernel ...] (Kaiming uniform) is the
    convolution, A' [k, (i, t)] = sum over j of core[k, j, t] A[j, i] in place of A.
    """

    papers = (
        Paper(
            "LoRA: Low-Rank Adaptation of Large Language Models", "Hu et al.", 2021, "https://arxiv.org/abs/2106.09685"
        ),
        Paper(
            "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA",
            "Kalajdzievski",
            2023,
            "https://arxiv.org/abs/2312.03732",
        ),
        Paper(
            "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation",
            "Yeh et al.",
            2023,
            "https://arxiv.org/abs/2309.14859",
        ),
    )
    known = (
        "Its authors report results equal to full fine-tuning's or better on RoBERTa, DeBERTa, GPT-2 and GPT-3, "
        "without latency in inference. The authors of SMT and of GraLoRA find that it stops gaining and then loses as "
        "its rank grows."
    )
    by_factors = True
    small = dict(rank=2)
    passes_x = True
    ups = ("B", "c")
    peft = Peft(
        "LORA",
        {
            "A": As("lora_A.weight", to_input_kernel, to_matrix),
            "B": As("lora_B.weight", to_point_kernel, to_matrix),
            "c": As("lora_B.bias", optional=True),
        },
        embedding={"A": As("lora_embedding_A"), "B": As("lora_embedding_B")},
        config={
            "r": "rank",
            "lora_alpha": "alpha",
            "lora_dropout": "dropout",
            "use_rslora": "rslora",
            "lora_bias": "bias",
        },
        patterns={"rank_pattern": "r", "alpha_pattern": "lora_alpha"},
        defaults={"use_rslora": False, "lora_bias": False},
        fixed={"bias": "none", "use_dora": False},
        neutral=frozenset(
            {"init_lora_weights", "loftq_config", "eva_config", "corda_config", "megatron_core", "qalora_group_size"}
        ),
        own=frozenset({"init"}),
        refuses=_changes_base,
    )
    adapter_hub = _LoraHub(
        "loras",
        {"A": As("lora_A"), "B": As("lora_B")},
        config={"r": "rank", "dropout": "dropout"},
        fixed={"architecture": "lora", "composition_mode": "add", "use_dora": False, "use_gating": False}
        | {"vera_d": None, "vera_b": None},
        neutral=frozenset({"alpha"}),
        own=frozenset({"alpha", "rslora", "init"}),
    )
    lycoris = LoCon(
        {
            "A": As("lora_down.weight", filters, matrix),
            "core": As("lora_mid.weight", optional=True),
            "B": As("lora_up.weight", point, matrix),
        },
        rank="A",
    )

    def __init__(
        self,
        site,
        *,
        rank: Annotated[int, "rank of the update", Range(1)] = 8,
        alpha: Annotated[float, "numerator of the scaling s"] = 16.0,
        dropout: Annotated[float, "probability of dropping an input of the update", Range(0, below=1)] = 0.0,
        rslora: Annotated[bool, "scale by alpha / sqrt(rank), which keeps high ranks learning"] = False,
        bias: Annotated[bool, "train a bias beside the matrices"] = False,
        init: Start = "random",
        tucker: Annotated[bool, "on kernels of convolutions, take the Tucker form"] = False,
    ):
        super().__init__(site)
        if bias and site.kind == "embedding":
            raise GraftError(f"lora: bias must be False at {site.path}: an embedding has none")
        tucker = tucker and site.taps > 1
        if tucker and init != RANDOM:
            raise GraftError(
                f"lora: init={init!r} starts two factors, and tucker has three at {site.path}: leave out one"
            )
        self.A = nn.Parameter(torch.empty(rank, site.d_in // site.taps if tucker else site.d_in))
        self.B = nn.Parameter(torch.zeros(site.d_out, rank))
        nn.init.kaiming_uniform_(self.A, a=5**0.5)
        self.core = None
        if tucker:
            core = torch.empty(rank, rank, *site.module.kernel_size)
            self.core = nn.Parameter(nn.init.kaiming_uniform_(core, a=5**0.5))
        self.c = nn.Parameter(torch.zeros(site.d_out)) if bias else None
        self.by_factors = not bias
        self.scaling, self.dropout = alpha / (rank**0.5 if rslora else rank), dropout
        self.begin(init, rank)

    def down(self):
        """A [rank, in], multiplied out where it is in Tucker form."""
        return self.A if self.core is None else tucker_form(self.core, self.A)

    def product(self):
        return self.down(), self.scaling * self.B

    def take(self, A, B):
        self.A.copy_(A)
        self.B.copy_(B)

    def absorbed(self):
        if self.A0 is None:
            return None
        A, B = self.factors()
        tensors = {"A": A, "B": B / self.scaling} | ({} if self.c is None else {"c": self.c})
        return {"rank": len(A), "alpha": self.scaling * len(A), "rslora": False, "init": RANDOM}, tensors

    def prepare(self, inner):
        A, B = (self.down(), self.B) if self.scales_later else self.factors()
        return A, B, None if self.c is None else self.scaling * self.c

    def act(self, inner, x, A, B, c=None):
        z = F.dropout(x, self.dropout, self.training) if self.dropout else x
        h = self.site.down(z, A)
        y = self.site.add_up(inner(x), self.scaling * h if self.scales_later else h, B)
        return y if c is None else self.site.shift(y, c)

    def weight(self, w):
        wide = torch.promote_types(w.dtype, self.B.dtype)
        return torch.addmm(self.rest(w).to(wide), self.B.to(wide), self.down().to(wide), alpha=self.scaling)

    def bias(self, b):
        if self.c is None:
            return b
        return self.scaling * self.c if b is None else b + self.scaling * self.c
