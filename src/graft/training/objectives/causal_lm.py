"""Predicting the next token."""

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...core.errors import GraftError
from ..batches import pack
from ..data import Examples, column, columns_of
from ..text import IGNORED, chat, completion, has_loss, join, plain, right_padded
from . import on, outputs_of
from .tokens import TokenLoss


class CausalLM(TokenLoss):
    """Cross entropy of the next token, over the tokens that carry loss.

    `text`: all of it; `prompt` + `completion`: the completion; `messages` ([{"role", "content"}, ...]): the assistant's
    turns, written by the tokenizer's chat template. With `packing`, several examples share a row without seeing each
    other.
    """

    name = "causal-lm"
    columns = (("text",), ("prompt", "completion"), ("messages",))
    auto = "AutoModelForCausalLM"

    packs = True

    def __init__(self, model: nn.Module, processor: Any = None, **options: Any):
        super().__init__(model, processor, **options)
        config = getattr(model, "config", None)
        self.options = {"use_cache": False} if hasattr(config, "use_cache") else {}
        self.selects = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.attention = getattr(config, "_attn_implementation", None) or "eager"
        if self.packing and not (self.attention in ("eager", "sdpa") or self.attention.startswith("flash")):
            raise GraftError(
                f"packing works with the attention implementations sdpa, eager and flash, not {self.attention}"
            )

    def features(self, examples: Examples) -> list[dict[str, np.ndarray]]:
        found = [f for f in self._tokens(examples) if has_loss(f)]
        if not found:
            raise GraftError(f"no example has a token to learn from within max_length={self.max_length}")
        if not self.packing:
            return found
        return [join([found[i] for i in row]) for row in pack([len(f["input_ids"]) for f in found], self.max_length)]

    def _tokens(self, examples: Examples) -> list[dict[str, np.ndarray]]:
        tokenizer, longest, present = self.processor, self.max_length, columns_of(examples)
        if "messages" in present:
            return [chat(tokenizer, m, longest) for m in column(examples, "messages")]
        if "prompt" in present:
            pairs = zip(column(examples, "prompt"), column(examples, "completion"))
            return [completion(tokenizer, p, c, longest) for p, c in pairs]
        return [part for text in column(examples, "text") for part in plain(tokenizer, text, longest)]

    def collate(self, features: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        if self.packing and self.attention.startswith(
            "flash"
        ):  # its kernels find the borders in the positions of one row
            row = {k: np.concatenate([f[k] for f in features]) for k in features[0]}
            return {k: torch.from_numpy(v)[None].long() for k, v in row.items()}
        batch = {
            "input_ids": right_padded([f["input_ids"] for f in features], self.pad),
            "labels": right_padded([f["labels"] for f in features], IGNORED),
        }
        if not self.packing:
            ones = [np.ones_like(f["input_ids"]) for f in features]
            return {**batch, "attention_mask": right_padded(ones, 0)}
        positions = right_padded([f["position_ids"] for f in features], 0)
        return {**batch, "position_ids": positions, "attention_mask": self._blocks(positions)}

    def _blocks(self, positions: Tensor) -> Tensor:
        """Who may see whom, [b, 1, t, t]: itself and what stands before it in the same example (a padding: itself)."""
        example = (positions == 0).cumsum(-1)
        before = torch.ones(positions.shape[1], positions.shape[1], dtype=torch.bool).tril()
        seen = (example[:, :, None] == example[:, None, :])[:, None] & before
        return (
            seen
            if self.attention == "sdpa"
            else torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
        )

    def logits(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        wanted = batch["labels"][:, 1:] != IGNORED
        if not self.selects:
            return outputs_of(model, batch, **self.options)[:, :-1][wanted]
        places = wanted.any(0).nonzero().flatten()  # where some row carries loss: the head computes nothing elsewhere
        return outputs_of(model, batch, **self.options, logits_to_keep=places)[wanted[:, places]]

    def predict(self, model: nn.Module, examples: Examples, **generation: Any) -> list[str]:
        """Continuations of `prompt`, of `messages` without the last answer, or of `text`; greedy by default."""
        tokenizer, present = self.processor, columns_of(examples)
        if "messages" in present:
            prompts = [
                tokenizer.apply_chat_template(
                    m[:-1] if m[-1]["role"] == "assistant" else m, add_generation_prompt=True, tokenize=False
                )
                for m in column(examples, "messages")
            ]
            rows = [tokenizer(p, add_special_tokens=False)["input_ids"] for p in prompts]
        else:
            rows = [tokenizer(p)["input_ids"] for p in column(examples, "prompt" if "prompt" in present else "text")]
        if [] in rows:
            raise GraftError(f"prompt {rows.index([])} has no token to go on from: give it at least one word")
        longest = max(map(len, rows))
        batch = {
            "input_ids": torch.tensor([[self.pad] * (longest - len(r)) + r for r in rows]),
            "attention_mask": torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in rows]),
        }
        out = model.generate(**on(model, batch), **{"do_sample": False, "pad_token_id": self.pad, **generation})  # type: ignore
        return tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)
