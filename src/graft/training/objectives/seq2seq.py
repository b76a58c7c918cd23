"""From one text to another with an encoder and a decoder."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from ...core.errors import GraftError
from ..data import Examples, column
from ..text import IGNORED, right_padded
from . import on, outputs_of
from .tokens import TokenLoss


class Seq2Seq(TokenLoss):
    """Cross entropy of the target's tokens given the input."""

    name = "seq2seq"
    columns = (("input", "target"),)
    auto = "AutoModelForSeq2SeqLM"

    def __init__(self, model: nn.Module, processor: Any = None, **options: Any):
        super().__init__(model, processor, **options)
        self.shift = getattr(model, "prepare_decoder_input_ids_from_labels", None) or getattr(
            model, "_shift_right", None
        )
        if self.shift is None:
            raise GraftError(
                f"{type(model).__name__} has no decoder that reads the target: use causal-lm, or another model"
            )

    def features(self, examples: Examples) -> list[dict[str, np.ndarray]]:
        options = {"truncation": True, "max_length": self.max_length}
        inputs = self.processor(column(examples, "input"), **options)["input_ids"]
        targets = self.processor(text_target=column(examples, "target"), **options)["input_ids"]
        return [
            {"input_ids": np.asarray(i, dtype=np.int32), "labels": np.asarray(t, dtype=np.int32)}
            for i, t in zip(inputs, targets)
        ]

    def collate(self, features: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        ids = [f["input_ids"] for f in features]
        labels = right_padded([f["labels"] for f in features], IGNORED)
        assert self.shift
        return {
            "input_ids": right_padded(ids, self.pad),
            "attention_mask": right_padded([np.ones_like(i) for i in ids], 0),
            "labels": labels,
            "decoder_input_ids": self.shift(labels),
        }

    def logits(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return outputs_of(model, batch, use_cache=False)[batch["labels"] != IGNORED]

    def predict(self, model: nn.Module, examples: Examples, **generation: Any) -> list[str]:
        """The targets as the model writes them; greedy unless told otherwise."""
        encoded = self.processor(
            column(examples, "input"), truncation=True, max_length=self.max_length, padding=True, return_tensors="pt"
        )
        batch = {k: encoded[k] for k in ("input_ids", "attention_mask")}
        out = model.generate(**on(model, batch), **{"do_sample": False, "num_beams": 1, **generation})  # type: ignore
        return self.processor.batch_decode(out, skip_special_tokens=True)
