"""LoRA-FA: LoRA with a frozen A. Zhang et al., 2023; Zhu et al., 2024."""

from typing import Annotated

import torch

from ...core.delta import Paper
from ...core.errors import GraftError
from ...core.hyper import Range
from .lora import LoRA


class LoRAFA(LoRA, name="lora_fa"):
    """W' = W + s B A with A [rank, in] frozen and B [out, rank] trained from zero; s = alpha / rank, or
    alpha / sqrt(rank) if `rslora`.

    The rows of A are random and orthonormal (Zhu et al.). Half the parameters of LoRA are trained, and the input of the
    module is not kept for backward, only A x. The gradient of B that comes nearest to that of W is
    dL/dB (A A^T)^-1 / s^2 (Zhang et al., and PEFT's `LoraFAOptimizer`): as A A^T = I it differs from dL/dB by a
    constant, which Adam does not see.

    A is not saved but drawn again from the adapter's seed, in float64: its last bits hardly depend on the machine.
    """

    papers = (
        Paper(
            "LoRA-FA: Efficient and Effective Low Rank Representation Fine-tuning",
            "Zhang et al.",
            2023,
            "https://arxiv.org/abs/2308.03303",
        ),
        Paper(
            "Asymmetry in Low-Rank Adapters of Foundation Models",
            "Zhu et al.",
            2024,
            "https://arxiv.org/abs/2402.16842",
        ),
    )
    known = (
        "Its authors report accuracy close to LoRA's and full fine-tuning's with up to 1.4 times less memory. The "
        "authors of `Asymmetry in Low-Rank Adapters` find that a random, frozen A does nearly as well as a trained "
        "one."
    )
    peft = "its LoRA-FA is an optimizer for a LoRA; graft.convert makes a LoRA of this"
    adapter_hub = "it saves A too; graft.convert makes a LoRA of this"
    lycoris = "it saves A too; graft.convert makes a LoRA of this"

    def __init__(
        self,
        site,
        *,
        rank: Annotated[int, "rank of the update, at most the width of the input", Range(1)] = 8,
        alpha: Annotated[float, "numerator of the scaling s"] = 16.0,
        dropout: Annotated[float, "probability of dropping an input of the update", Range(0, below=1)] = 0.0,
        rslora: Annotated[bool, "scale by alpha / sqrt(rank), which keeps high ranks learning"] = False,
    ):
        super().__init__(site, rank=rank, alpha=alpha, dropout=dropout, rslora=rslora)
        if rank > site.d_in:
            raise GraftError(f"lora_fa: rank must be at most the {site.d_in} inputs of {site.path}, not {rank}")
        del self.A
        columns = torch.linalg.qr(torch.randn(site.d_in, rank, dtype=torch.float64)).Q
        self.register_buffer("A", columns.T.float().contiguous(), persistent=False)
