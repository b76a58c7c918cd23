"""VB-LoRA: Extreme Parameter Efficient Fine-Tuning with Vector Banks. Li, Han, Ji, 2024."""

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.delta import Delta, Paper
from ...core.errors import GraftError
from ...core.formats.peft import As, Peft
from ...core.hyper import Range


def _without_logits(config: dict) -> str | None:
    if config.get("save_only_topk_weights", False):
        return "save_only_topk_weights=True left the logits out, all but the largest; save it with False"
    return None


class VBLoRA(Delta, name="vblora"):
    """W' = W + B A whose rows and columns are cut into pieces, each a mixture of vectors of one bank for all sites.

    A piece is the sum over i in top of softmax(l_top)_i bank_i, `top` the places of the `topk` largest of its logits
    l [count]; bank [count, length] and all logits are trained. A [rank, in] has the logits logits_A
    [rank, in / length, count], B [out, rank] logits_B [out / length, rank, count], whose pieces lie along `out`.
    The bank starts uniform within `bank_bound`, the logits normal with deviation `logits_std`: as in the paper
    neither factor is zero, so that the model starts near the base, not as the base.
    """

    papers = (
        Paper(
            "VB-LoRA: Extreme Parameter Efficient Fine-Tuning with Vector Banks",
            "Li, Han, Ji",
            2024,
            "https://arxiv.org/abs/2405.15179",
        ),
    )
    known = (
        "Its authors report better results than LoRA with 0.4 % of its stored parameters on Llama2-13B. PEFT's "
        "documentation advises a higher learning rate for the logits than for the bank."
    )
    hosts = ("linear",)
    passes_x = True
    by_factors = True
    starts_as_base = False
    small = dict(rank=2, count=5, length=4, bank_bound=0.5)
    peft = Peft(
        "VBLORA",
        {"logits_A": As("vblora_logits_A"), "logits_B": As("vblora_logits_B")},
        shared={"bank": As("vblora_vector_bank")},
        config={
            "r": "rank",
            "num_vectors": "count",
            "vector_length": "length",
            "topk": "topk",
            "vblora_dropout": "dropout",
            "init_vector_bank_bound": "bank_bound",
            "init_logits_std": "logits_std",
        },
        fixed={"bias": "none", "save_only_topk_weights": False},
        refuses=_without_logits,
        hosts=("Linear", "Conv1D"),
    )

    @classmethod
    def share(cls, sites, *, count, length, bank_bound, **_):
        shared = nn.Module()
        shared.bank = nn.Parameter(torch.empty(count, length).uniform_(-bank_bound, bank_bound))
        return shared

    def __init__(
        self,
        site,
        shared,
        *,
        rank: Annotated[int, "rank of the update", Range(1)] = 4,
        count: Annotated[int, "vectors of the bank", Range(1)] = 256,
        length: Annotated[int, "length of these vectors, which divides both sizes of every site", Range(1)] = 256,
        topk: Annotated[int, "vectors that are mixed into a piece", Range(1)] = 2,
        dropout: Annotated[float, "probability of dropping an input of the update", Range(0, below=1)] = 0.0,
        bank_bound: Annotated[float, "bound of the bank's start", Range(0)] = 0.02,
        logits_std: Annotated[float, "deviation of the logits' start", Range(0)] = 0.1,
    ):
        super().__init__(site, shared)
        if shared.bank.shape != (count, length):
            raise GraftError(f"vblora: count and length must be the same at all sites, which share a bank: {site.path}")
        if topk > count:
            raise GraftError(f"vblora: topk {topk} is more than the {count} vectors of the bank")
        if site.d_in % length or site.d_out % length:
            raise GraftError(
                f"vblora: length {length} must divide both sizes of {site.path}, {site.d_in} and {site.d_out}"
            )
        self.logits_A = nn.Parameter(logits_std * torch.randn(rank, site.d_in // length, count))
        self.logits_B = nn.Parameter(logits_std * torch.randn(site.d_out // length, rank, count))
        self.topk, self.dropout = topk, dropout

    def factors(self):
        A = self._mixed(self.logits_A).flatten(1)
        return A, self._mixed(self.logits_B).transpose(1, 2).flatten(0, 1)

    def _mixed(self, logits: Tensor) -> Tensor:
        best, places = logits.topk(self.topk, -1)
        return (best.softmax(-1).unsqueeze(-1) * self.shared.bank[places]).sum(-2)

    def prepare(self, inner):
        return self.factors()

    def act(self, inner, x, A, B):
        z = F.dropout(x, self.dropout, self.training) if self.dropout else x
        return self.site.add_up(inner(x), self.site.down(z, A), B)

    def weight(self, w):
        A, B = self.factors()
        return w + B @ A
