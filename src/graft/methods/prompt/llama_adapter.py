"""LLaMA-Adapter: Efficient Fine-tuning of Language Models with Zero-init Attention. Zhang et al., 2023."""

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import nn

from ...core.attention import Attention
from ...core.delta import Paper
from ...core.errors import GraftError
from ...core.formats.peft import OWN, As, Peft
from ...core.hyper import Range
from ...core.stacked import each_of, left_padded


class _AdaptionPromptPeft(Peft):
    """PEFT has one gate for all heads of a module, and no tanh around it."""

    def chosen(self, adapter):
        return {path: d for path, d in super().chosen(adapter).items() if d.on}

    def targets(self, modules, paths):
        name = paths[-1].rpartition(".")[2]
        if [p for p in modules if p.endswith(f".{name}")][-len(paths) :] != paths:
            raise GraftError(
                f"PEFT's ADAPTION_PROMPT adapts the last modules called {name}, this adapter others: {OWN}"
            )
        return name

    def check_host(self, site):
        kind, out = getattr(site.base_config, "model_type", ""), getattr(site.module, "o_proj", None)
        if kind not in ("llama", "mistral"):
            raise GraftError(
                f"PEFT's ADAPTION_PROMPT computes the same on Llama and Mistral only, not on {kind!r}: {OWN}"
            )
        if out is None or out.bias is not None:
            raise GraftError(f"PEFT's ADAPTION_PROMPT adds the bias of {site.path}.o_proj twice: {OWN}")

    def site_out(self, delta):
        gate = delta.gate.tanh()
        if (gate != gate[0]).any():
            raise GraftError(
                f"PEFT has one gate for all heads of {delta.site.path}, this adapter different ones: {OWN}"
            )
        return {"adaption_prompt": delta.prompt[None], "adaption_gate": gate[:1]}

    def site_in(self, site, found, config):
        self.check_host(site)
        state = super().site_in(site, found, config)
        if not (state["gate"].abs() < 1).all():
            raise GraftError(f"the gate of {site.path} is {state['gate'].item():g}: tanh reaches values below 1 only")
        gate = state["gate"].double().atanh().to(state["gate"].dtype)
        return {"prompt": state["prompt"], "gate": gate.repeat(site.base_config.num_attention_heads)}

    def write_config(self, method, deltas, hyper):
        return super().write_config(method, deltas, hyper) | {"adapter_layers": len(deltas)}

    def read_config(self, method, config, sites, found):
        return super().read_config(method, config, sites, found) | {"layers": len(sites)}


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
    known = (
        "Its authors report answers of LLaMA-7B comparable to those of the fully fine-tuned Alpaca, with 1.2 million "
        "parameters and less than an hour on 8 A100."
    )
    passes_x = True
    small = dict(length=3)
    peft = _AdaptionPromptPeft(
        "ADAPTION_PROMPT",
        {"prompt": As("adaption_prompt", read=lambda site, value: value[0]), "gate": As("adaption_gate")},
        config={"adapter_len": "length"},
        neutral=frozenset({"adapter_layers"}),
        own=frozenset({"layers"}),
        heads=False,
    )

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

    def sources(self):
        return super().sources() + self.site.sources()

    def prepare(self, inner):
        """K and V [heads, length, size], and tanh(g)."""
        if not self.on:
            return ()
        heads = len(self.gate)
        K, V = self.site.keys_values(self.prompt.to(self.site.where().dtype))
        return *(t.repeat_interleave(heads // len(t), 0) for t in (K, V)), self.gate.tanh()

    @classmethod
    def stack(cls, prepared):
        if not any(prepared):
            return None
        K, keep = left_padded([p[0] if p else None for p in prepared])
        V, _ = left_padded([p[1] if p else None for p in prepared])
        none = torch.zeros_like(next(p for p in prepared if p)[2])
        gate = torch.stack([p[2] if p else none for p in prepared])
        if keep is not None:  # a row without any sees zeros, which its gate shuts out
            keep = keep | ~keep.any(1, keepdim=True)
        return K, V, gate, keep

    def act_stacked(self, inner, stacked, q, k, v, mask=None, **kwargs):
        out, weights = inner(q, k, v, mask, **kwargs)  # [batch, length, heads, size]
        if stacked is None:
            return out, weights
        *own, keep = stacked
        K, V, gate = (each_of(t.to(q.dtype), len(q), self.site.path) for t in own)
        seen = None if keep is None else each_of(keep, len(q), self.site.path)[:, None, None]
        extra = F.scaled_dot_product_attention(q, K, V, seen, scale=kwargs.get("scaling")).transpose(1, 2)
        return out + gate[:, None, :, None] * extra, weights
