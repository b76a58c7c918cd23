"""LLaMA-Adapter: Efficient Fine-tuning of Language Models with Zero-init Attention. Zhang et al., 2023."""

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import nn

from ...core.attention import Attention
from ...core.delta import Paper
from ...core.hyper import Range


class LlamaAdapter(Attention, name="llama_adapter"):
    """o' = o + tanh(g) softmax(q K^T c) V in the last `layers` self-attentions, c the scale of the product.

    K and V [kv heads, length, size] are the module's own projections of a prompt P [length, width], without positions;
    both it and the gates g [heads] are trained. The gates start at zero, the prompt from a standard normal.
    """

    papers = (
        Paper(
            "LLaMA-Adapter: Efficient Fine-tuning of Language Models with Zero-init Attention",
            "Zhang et al.",
            2023,
            "https://arxiv.org/abs/2303.16199",
        ),
    )
    small = dict(length=3)

    def __init__(
        self,
        site,
        *,
        length: Annotated[int, "vectors of the prompt", Range(1)] = 10,
        layers: Annotated[int, "how many of the chosen modules, counted from the last, are adapted", Range(1)] = 30,
    ):
        super().__init__(site)
        self.on = site.index >= site.count - layers
        if self.on:
            self.prompt = nn.Parameter(torch.randn(length, site.base_config.hidden_size))
            self.gate = nn.Parameter(torch.zeros(site.base_config.num_attention_heads))

    def forward(self, inner, q, k, v, mask=None, **kwargs):
        out, weights = inner(q, k, v, mask, **kwargs)  # [batch, length, heads, size]
        if not self.on:
            return out, weights
        batch, heads = q.shape[:2]
        K, V = self.site.keys_values(self.prompt.to(self.site.where().dtype))
        K, V = (
            t.to(q.dtype).repeat_interleave(heads // len(t), 0).expand(batch, -1, -1, -1) for t in (K, V)
        )  # [batch, heads, prompt, size]
        extra = F.scaled_dot_product_attention(q, K, V, scale=kwargs.get("scaling")).transpose(1, 2)
        return out + self.gate.tanh().to(out.dtype)[:, None] * extra, weights
