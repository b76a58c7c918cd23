"""NFTS: Neural Fine-Tuning Search for Few-Shot Learning. Eustratiadis et al., 2024."""

from collections.abc import Sequence
from typing import Annotated, Any

from ....core.hyper import Range
from .. import SinglePath
from ..mixed import Space
from ..supernet import Member, blocks


class NFTS(SinglePath):
    """In each block: its matrices frozen or fine-tuned, and an adapter there or not.

    Two adapters of the supernet: `full` at the matrices, and outside of it the adapter; each of them in each block is
    there or not, which are four kinds of a block. A step trains one path, drawn evenly, but never one where an adapter
    is nowhere; evolution with the inherited weights follows, and scores these, too, unless nothing at all is trained.
    The best `keep` paths are found, of which `graft search` trains each anew and chooses by the validation data.

    The paper trains the supernet on episodes of many few-shot tasks, keeps several paths that differ, and chooses among
    them for each new task by its own examples. Here one task is given and the supernet is trained on it; how the paper
    makes its paths differ could not be read, so that here no two are the same and nothing more. Only the paper's
    abstract and a review of it could be read, and no code of it was found: evolution is that of NOAH's code; both
    papers build on Single Path One-Shot.
    """

    name = "nfts"

    def __init__(
        self,
        *,
        adapter: Annotated[str, "the adapter of a block"] = "lora",
        on: Annotated[Any, "modules to adapt; by default those that the adapter is made for"] = None,
        fine_tuned: Annotated[Sequence[str] | str, "modules to fine-tune"] = "all-linear",
        keep: Annotated[int, "paths to find", Range(1)] = 3,
    ):
        self.keep = keep
        self.adapter, self.on, self.fine_tuned = adapter, on, fine_tuned

    def members(self, base):
        where = blocks(base.model)
        return {
            "full": Member(Space([None, "full"], where), self.fine_tuned),
            "adapter": Member(Space([None, self.adapter], where), self.on),
        }
