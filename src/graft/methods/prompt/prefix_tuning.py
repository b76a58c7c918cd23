"""Prefix tuning (Li and Liang, 2021) and P-tuning v2 (Liu et al., 2021)."""

from typing import Annotated

import torch
from torch import nn

from ...core.attention import Attention
from ...core.delta import Paper
from ...core.hyper import Range


class PrefixTuning(Attention, name="prefix_tuning"):
    """o = softmax(q [K; k]^T c) [V; v] in every self-attention, K and V [kv heads, length, size] trained, c the scale.

    The prefix stands in front of the keys after positions were put into them, and not in the cache: token t keeps
    position t, and no relative position bias falls on the prefix. (PEFT puts the prefix into the cache, so that token t
    is at position length + t. With rotary positions its K is ours turned by length positions; with learned positions
    the two are different models.)

    P-tuning v2 trains K and V themselves. With `reparameterize`, as in prefix tuning, they come out of a network,
    [K, V] = U tanh(W E + b) + a, with E [length, width], W [hidden, width] and b shared by all layers and U, a of each
    layer: the original's one network, whose last matrix has the rows of all layers.
    """

    papers = (
        Paper(
            "Prefix-Tuning: Optimizing Continuous Prompts for Generation",
            "Li and Liang",
            2021,
            "https://arxiv.org/abs/2101.00190",
        ),
        Paper(
            "P-Tuning v2: Prompt Tuning Can Be Comparable to Fine-tuning Universally Across Scales and Tasks",
            "Liu et al.",
            2021,
            "https://arxiv.org/abs/2110.07602",
        ),
    )
    starts_as_base = False
    small = dict(length=3)

    def __init__(
        self,
        site,
        shared=None,
        *,
        length: Annotated[int, "vectors of the prefix", Range(1)] = 20,
        reparameterize: Annotated[bool, "train a network that gives K and V, instead of K and V"] = False,
        hidden: Annotated[int, "width of that network", Range(1)] = 512,
    ):
        super().__init__(site, shared)
        self.heads, self.size = heads, size = site.kv_shape
        if reparameterize:
            self.up = nn.Linear(hidden, 2 * heads * size)
        else:
            self.keys = nn.Parameter(torch.randn(heads, length, size))
            self.values = nn.Parameter(torch.randn(heads, length, size))

    @classmethod
    def share(cls, sites, *, length, reparameterize, hidden):
        return Reparameterization(length, sites[0].base_config.hidden_size, hidden) if reparameterize else None

    def prefix(self):
        """K and V [kv heads, length, size]."""
        if self.shared is None:
            return self.keys, self.values
        K, V = self.up(self.shared()).unflatten(-1, (2, self.heads, self.size)).permute(1, 2, 0, 3)
        return K, V

    def forward(self, inner, q, k, v, mask=None, **kwargs):
        K, V = self.prefix()
        return self.prepend(inner, K, V, q, k, v, mask, **kwargs)


class Reparameterization(nn.Module):
    """tanh(W E + b): [length, hidden]."""

    def __init__(self, length: int, width: int, hidden: int):
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(length, width))
        self.down = nn.Linear(width, hidden)

    def forward(self):
        return torch.tanh(self.down(self.embedding))
