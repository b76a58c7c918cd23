"""DARTS placement: PEFT for Speech: Unveiling Optimal Placement, Merging Strategies, and Ensemble Techniques. Lin et
al., 2024."""

from collections.abc import Sequence
from typing import Annotated, Any

from ....core.hyper import Range
from .. import Softmax
from ..mixed import Space
from ..supernet import Member, blocks


class DARTS(Softmax):
    """Which method in which block: y = sum_k p_k y_k over the methods, p the softmax of logits of each block.

    The logits learn from the examples kept aside, by first-order DARTS (https://arxiv.org/abs/1806.09055): each step
    their gradient is that of the loss on a batch of these, everything else learns from the other examples. At the end
    each block keeps its likeliest method.

    Do not expect much: the paper found that such a placement does not beat one method in all layers of a speech model,
    and that the majority vote of models tuned by different methods does (`vote`). Of the paper its abstract
    and summaries of it could be read; the rest is DARTS.
    """

    name = "darts"

    def __init__(
        self,
        *,
        methods: Annotated[Sequence[Any], "what a block may have: methods for hosts of one kind, none"] = (
            "lora", "ia3", "none",
        ),
        targets: Annotated[Any, "modules to adapt; by default those of the first method"] = None,
        aside: Annotated[float, "share of the examples for the logits", Range(above=0, below=1)] = 0.5,
    ):  # fmt: skip
        self.methods, self.targets, self.aside = methods, targets, aside

    def members(self, base):
        space = Space(self.methods, blocks(base.model))
        return {"mixed": Member(space, self.targets, "outputs", self.aside)}
