"""RoSA: Accurate Parameter-Efficient Fine-Tuning via Robust Adaptation. Nikdan et al., 2024."""

from typing import Annotated, Literal

from ...core.delta import Delta, Paper
from ...core.host import Link
from ...core.hyper import Range
from ..selection.shira import SHiRA
from .lora import LoRA


class RoSA(Delta, name="rosa"):
    """W' = W + s B A + S: a LoRA, `low`, with A [rank, in] and B [out, rank], and a sparse S [out, in], `sparse`.

    Only `density` of the entries of S are trained, from zero, at positions that are chosen once: by default those of
    the largest gradients |dL/dW| over the batches given to graft.collect (with one batch, as in the authors'
    experiments, their mean of squared gradients chooses the same). W + S is formed at their positions and formed again
    for backward, the low-rank part acts on activations.

    The authors (github.com/IST-DASLab/peft-rosa) take the gradients after 64 steps of LoRA and then begin anew with the
    positions: train a LoRA, `stats = graft.collect(...)` while it is on the model, detach it, attach RoSA with stats.
    Their densities are 0.0045 to 0.018 in bfloat16; alpha is 16.
    """

    papers = (
        Paper(
            "RoSA: Accurate Parameter-Efficient Fine-Tuning via Robust Adaptation",
            "Nikdan et al.",
            2024,
            "https://arxiv.org/abs/2401.04679",
        ),
    )
    known = (
        "Its authors report better results than LoRA and sparse fine-tuning with as many parameters on tasks that need "
        "fine-tuning: grade-school mathematics and SQL."
    )
    needs = SHiRA.needs
    small = dict(rank=2, density=0.2, mask="random")

    @classmethod
    def asks(cls, hyper):
        return SHiRA.asks(hyper)

    def __init__(
        self,
        site,
        *,
        rank: Annotated[int, "rank of the low-rank part", Range(1)] = 16,
        alpha: Annotated[float, "numerator of the scaling s"] = 16.0,
        dropout: Annotated[float, "probability of dropping an input of the low-rank part", Range(0, below=1)] = 0.0,
        rslora: Annotated[bool, "s = alpha / sqrt(rank) in place of alpha / rank"] = False,
        density: Annotated[float, "share of the entries of W which are trained", Range(above=0, high=1)] = 0.006,
        mask: Annotated[
            Literal["gradient", "random", "magnitude", "snip", "structured"], "how the entries are chosen, see shira"
        ] = "gradient",
    ):
        super().__init__(site)
        self.low = LoRA(site, rank=rank, alpha=alpha, dropout=dropout, rslora=rslora)
        self.sparse = SHiRA(site.within("sparse"), density=density, mask=mask)

    def forward(self, inner, x):
        return self.low(Link(inner, self.sparse), x)

    def weight(self, w):
        return self.low.weight(self.sparse.weight(w))
