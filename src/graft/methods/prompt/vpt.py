"""Visual Prompt Tuning, the deep form. Jia et al., 2022."""

from typing import Annotated

import torch
from torch import nn

from ...core.attention import Attention
from ...core.delta import Paper
from ...core.hyper import Range


class VPT(Attention, name="vpt"):
    """o = softmax(q [K; k]^T c) [V; v] in every self-attention, with K and V [kv heads, length, size] the module's own
    projections of a prompt P [length, width], which is trained, and c the scale of the product.

    The paper puts new vectors beside the tokens that enter each block, and drops what the block makes of them. No token
    sees more of them than their keys and values, so this computes the same without their queries and their MLP. In a
    block that begins with a norm, P is what that norm would make of the paper's vectors.

    P starts from a standard normal: the authors' code draws uniformly before the norm. Keys get no positions, so in a
    language model every token sees P at distance 0. The shallow form, vectors at the first block alone that go on
    through the others, is prompt tuning, for models that take embeddings.
    """

    papers = (Paper("Visual Prompt Tuning", "Jia et al.", 2022, "https://arxiv.org/abs/2203.12119"),)
    known = (
        "Its authors report better results than full fine-tuning on many image tasks with less than 1 % of the "
        "parameters. The authors of `Facing the Elephant in the Room` find it preferable where the task is far from "
        "that of pre-training, or the images are like those."
    )
    starts_as_base = False
    small = dict(length=3)

    def __init__(self, site, *, length: Annotated[int, "vectors of each prompt", Range(1)] = 5):
        super().__init__(site)
        self.prompt = nn.Parameter(torch.randn(length, site.base_config.hidden_size))

    def sources(self):
        return super().sources() + self.site.sources()

    def prepare(self, inner):
        return self.site.keys_values(self.prompt.to(self.site.where().dtype))
