"""TangleNAS: Weight-Entanglement Meets Gradient-Based Neural Architecture Search. Sukthanker et al., 2024."""

from collections.abc import Sequence
from typing import Annotated, Any

from ....core.hyper import Range
from ....core.recipe import Recipe
from .. import Softmax
from ..mixed import Space
from ..supernet import Member, blocks


class TangleNAS(Softmax):
    """Which rank in which block: one LoRA runs, with A = sum_k p_k pad(A[:r_k]) and B = sum_k p_k pad(B[:, :r_k]).

    p is the softmax of logits of each block; `pad` fills up with zeros to the largest rank. So no more is computed and
    kept than with that rank, and with one p_k = 1 it is the LoRA of rank r_k. Logits and cap as in `DARTS`. The scaling
    alpha / rank is the same for all ranks, else the ranks would not be slices of one another.

    The sum of padded slices is that of the authors' code (github.com/automl/TangleNAS), with its DARTS optimizer. The
    paper trains networks from scratch; ranks of adapters are not among its searches.
    """

    name = "tanglenas"

    def __init__(
        self,
        *,
        ranks: Annotated[Sequence[int], "to choose among; 0: nothing there"] = (0, 2, 4, 8),
        scaling: Annotated[float, "alpha / rank"] = 2.0,
        targets: Annotated[Any, "matrices to adapt"] = "all-linear",
        aside: Annotated[float, "share of the examples for the logits", Range(above=0, below=1)] = 0.5,
    ):
        self.ranks, self.scaling, self.targets, self.aside = ranks, scaling, targets, aside

    def members(self, base):
        options = [Recipe.of("lora", rank=r, alpha=self.scaling * r) if r else None for r in self.ranks]
        return {"lora": Member(Space(options, blocks(base.model)), self.targets, "weights", self.aside)}
