"""Cross entropy over tokens: what causal and encoder-decoder language models share."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ..text import IGNORED, limit
from . import Objective


class TokenLoss(Objective):
    """Metrics: mean loss per token, perplexity exp(loss), share of tokens that were the likeliest."""

    metrics = {"loss": False, "perplexity": False, "token_accuracy": True}
    generates = True
    classes = True

    def __init__(self, model: nn.Module, processor: Any = None, **options: Any):
        super().__init__(model, processor, **options)
        self.max_length = limit(model, processor, self.max_length)
        ends = (processor.pad_token_id, processor.eos_token_id)
        self.pad = next((i for i in ends if i is not None), 0)

    @abstractmethod
    def logits(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """[n, vocabulary]: what is said at each place that carries loss, in the order of the labels."""

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        logits = self.logits(model, batch)  # only these become fp32, not [b, t, vocabulary]
        return F.cross_entropy(logits.float(), batch["labels"][batch["labels"] != IGNORED], reduction="sum"), logits

    def terms(self, batch: dict[str, Tensor]) -> int:
        return int((batch["labels"] != IGNORED).sum())

    def record(self, outputs: Tensor, batch: dict[str, Tensor]) -> dict[str, Any]:
        labels = batch["labels"][batch["labels"] != IGNORED]
        return {"hits": int((outputs.argmax(-1) == labels).sum()), "tokens": len(labels)}

    def score(self, records: Sequence[dict[str, Any]], loss: float) -> dict[str, float]:
        hits, tokens = (sum(r[k] for r in records) for k in ("hits", "tokens"))
        return {"loss": loss, "perplexity": math.exp(min(loss, 700)), "token_accuracy": hits / tokens}
