"""The Power of Scale for Parameter-Efficient Prompt Tuning. Lester et al., 2021."""

from typing import Annotated, Literal

import torch
from torch import nn

from ...core.delta import Paper
from ...core.formats.peft import PromptPeft
from ...core.hyper import Range
from ...core.prompt import Prompt


class _PromptTuningPeft(PromptPeft):
    def embeddings(self, adapter):
        return next(iter(adapter.deltas.values())).embedding

    def from_embeddings(self, model, sites, value, config):
        return {f"{next(iter(sites))}:embedding": value}


class PromptTuning(Prompt, name="prompt_tuning"):
    """y = f([P; embed(tokens)]), P [length, width] trained; the outputs are those of the tokens.

    The prompt stands before the first token, padding on the left included, at positions 0 .. length-1; the tokens
    follow at positions moved by length. P starts from the embeddings of random tokens, of the given `tokens`, or
    uniform in [-0.5, 0.5]. In an encoder-decoder model the encoder reads it.

    Logits, labels and loss concern the caller's tokens only: a causal model is not trained to give the first token
    after the prompt, which PEFT counts in its loss unless that token's label is -100.
    Documents packed into one row and told apart by positions that start again would not all see the prompt.
    """

    papers = (
        Paper(
            "The Power of Scale for Parameter-Efficient Prompt Tuning",
            "Lester et al.",
            2021,
            "https://arxiv.org/abs/2104.08691",
        ),
    )
    known = (
        "Its authors report that it reaches full fine-tuning in models beyond billions of parameters, and takes a "
        "change of domain better. The authors of P-Tuning v2 find it weak in models of normal size and in sequence "
        "labelling."
    )
    small = dict(length=3)
    adapter_hub = "it puts the prompt behind the positions and the norm of the embeddings"
    peft = _PromptTuningPeft(
        "PROMPT_TUNING",
        config={"num_virtual_tokens": "length"},
        fixed={"num_transformer_submodules": 1},
        neutral=frozenset(
            {
                "token_dim",
                "num_attention_heads",
                "num_layers",
                "prompt_tuning_init",
                "prompt_tuning_init_text",
                "tokenizer_name_or_path",
                "tokenizer_kwargs",
            }
        ),
        own=frozenset({"init", "tokens"}),
    )

    def __init__(
        self,
        site,
        *,
        length: Annotated[int, "vectors of the prompt", Range(1)] = 100,
        init: Annotated[Literal["vocabulary", "uniform"], "where the vectors start"] = "vocabulary",
        tokens: Annotated[tuple | None, "ids of tokens to start from, repeated to the length"] = None,
    ):
        super().__init__(site)
        self.length = length
        if not self.reads:
            return
        count = site.module.get_input_embeddings().weight.shape[0]
        ids = torch.randint(count, (length,)) if tokens is None else torch.tensor(tokens).repeat(length)[:length]
        with torch.no_grad():
            start = self.embed(ids.to(site.where().device)).float().cpu()
        self.embedding = nn.Parameter(start if init == "vocabulary" or tokens else torch.rand_like(start) - 0.5)

    def prompt(self):
        return self.embedding
