"""Text classification."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..data import Examples
from ..text import encoded, limit, padded
from . import on, outputs_of
from .labelled import Labelled


class Classification(Labelled):
    """A label for a text, or for a pair of texts (`text` and `text_pair`)."""

    name = "classification"
    columns = (("text", "label"),)
    auto = "AutoModelForSequenceClassification"

    def __init__(self, model: nn.Module, processor: Any = None, **options: Any):
        super().__init__(model, processor, **options)
        self.max_length = limit(model, processor, self.max_length)

    @classmethod
    def suits(cls, columns: Sequence[str], example: Mapping[str, Any], architecture: str = "") -> bool:
        return super().suits(columns, example) and not isinstance(example["label"], float)

    def features(self, examples: Examples) -> list[dict[str, Any]]:
        tokens = encoded(self.processor, examples, self.max_length)
        return [{**t, "labels": i} for t, i in zip(tokens, self.ids(examples))]

    def collate(self, features: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        return padded(self.processor, features, torch.long)

    def predict(self, model: nn.Module, examples: Examples, **generation: Any) -> list[Any]:
        batch = padded(self.processor, encoded(self.processor, examples, self.max_length))
        return self.named(outputs_of(model, on(model, batch)))
