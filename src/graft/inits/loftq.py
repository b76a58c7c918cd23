"""LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models. Li et al., 2023."""

from typing import Annotated

from ..core.delta import Paper
from ..core.errors import GraftError
from ..core.factored import Init, wide
from ..core.hyper import Range


class LoftQ(Init, name="loftq"):
    """s B A = the best approximation of the given rank to W - Q, what a quantised base Q [out, in] lost of the original
    matrix W: A = (S / s)^1/2 V [rank, in] and B = U (S / s)^1/2 [out, rank] from the largest triplets U S V.

    W is the statistic "weight" of the original model: stats=graft.collect(original, (), needs=["weight"]). The adapted
    model starts nearer to the original than the base does. The codes of Q stay as they are, as in PEFT's
    `replace_lora_weights_loftq`, where the paper goes on to quantise W - s B A anew.
    """

    papers = (
        Paper(
            "LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models",
            "Li et al.",
            2023,
            "https://arxiv.org/abs/2310.08659",
        ),
    )
    known = (
        "Its authors report better results than other ways of quantising for LoRA, above all at 2 bits and at a "
        "mixture of 2 and 4 bits."
    )
    needs = ("weight",)
    starts_as_base = False

    def __init__(
        self, *, niter: Annotated[int | None, "iterations of a fast, random SVD; left out, exact", Range(1)] = None
    ):
        self.niter = niter

    def factors(self, site, rank, scaling):
        original, own = wide(site.stats["weight"]), wide(site.weight)
        if original.shape != own.shape:
            raise GraftError(
                f"loftq: the original matrix of {site.path} is {list(original.shape)}, not {list(own.shape)}"
            )
        U, S, V = self.triplets(site, original.to(own.device) - own, rank, self.niter)
        root = (S / scaling).sqrt()
        return root[:, None] * V, U * root
