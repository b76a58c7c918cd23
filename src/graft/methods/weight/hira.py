"""HiRA: Parameter-Efficient Hadamard High-Rank Adaptation. Huang et al., 2025."""

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import nn

from ...core.delta import Delta, Paper
from ...core.errors import GraftError
from ...core.formats import OWN
from ...core.formats.peft import As, Peft, to_input_kernel, to_matrix, to_point_kernel
from ...core.hyper import Range


def _unscaled(site, value):
    """The value itself: PEFT leaves out the factor with which some models multiply embeddings."""
    if getattr(site.module, "embed_scale", None) is not None:
        raise GraftError(f"PEFT's HIRA leaves out the scale of the embedding {site.path}: {OWN}")
    return value


class HiRA(Delta, name="hira"):
    """W' = W + W ∘ (B A) with ∘ the entrywise product: a change of high rank where W has a high rank.

    A [rank, in] is random (Kaiming uniform) and B [out, rank] zero, so that the adapted model starts as the base; there
    is no scaling. The change has no thin factors: W ∘ (B A) is formed, and formed again for backward, where with
    G = dL/dW' ∘ W the gradients are dL/dB = G A^T and dL/dA = B^T G. Beside a half-precision base the change has a
    product of its own, for W + W ∘ (B A) would round it away. Dropout falls on the input of the update only.

    Start and default rank are those of PEFT's HiRA.
    """

    papers = (
        Paper(
            "HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large Language Models",
            "Huang et al.",
            2025,
            "https://proceedings.iclr.cc/paper_files/paper/2025/hash/48c368f105e8145b945227b73255635a-Abstract-Conference.html",
        ),
    )
    known = "Its authors report better results than LoRA and its variants on several tasks of large language models."
    small = dict(rank=2)
    ups = ("B",)
    peft = Peft(
        "HIRA",
        {"A": As("hira_A", to_input_kernel, to_matrix), "B": As("hira_B", to_point_kernel, to_matrix)},
        embedding={"A": As("hira_embedding_A", _unscaled, _unscaled), "B": As("hira_embedding_B")},
        config={"r": "rank", "hira_dropout": "dropout"},
        patterns={"rank_pattern": "r"},
        neutral=frozenset({"init_weights"}),
    )

    def __init__(
        self,
        site,
        *,
        rank: Annotated[int, "rank of B A", Range(1)] = 32,
        dropout: Annotated[float, "probability of dropping an input of the update", Range(0, below=1)] = 0.0,
    ):
        super().__init__(site)
        if dropout and site.kind == "embedding":
            raise GraftError(
                f"hira: dropout must be 0 at {site.path}, not {dropout}: the inputs of an embedding are ids"
            )
        self.A = nn.Parameter(torch.empty(rank, site.d_in))
        self.B = nn.Parameter(torch.zeros(site.d_out, rank))
        nn.init.kaiming_uniform_(self.A, a=5**0.5)
        self.dropout = dropout

    def forward(self, inner, x):
        if x.dtype.itemsize >= 4 and not (self.dropout and self.training):
            w, b = inner.weight, self.bias(inner.bias)
            return self.site.apply_formed(x, _raised, w, b, self.A, self.B, pull=_gradients)
        z = F.dropout(x, self.dropout, self.training) if self.dropout else x
        return inner(x) + self.site.apply_formed(z, _change, inner.weight, None, self.A, self.B, pull=_gradients)

    def weight(self, w):
        return _raised(w.to(torch.promote_types(w.dtype, self.B.dtype)), self.A, self.B)


def _change(w, A, B):
    return w * (B @ A)


def _raised(w, A, B):
    return torch.addcmul(w, w, B @ A)


def _gradients(g, x, w, A, B):
    G = (g.mT @ x) * w.to(g.dtype)
    return (B.to(G.dtype).mT @ G).to(A.dtype), (G @ A.to(G.dtype).mT).to(B.dtype)
