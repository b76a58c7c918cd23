"""Numbers for a text."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...core.errors import GraftError
from ..data import Examples, column
from ..text import encoded, limit, padded
from . import Objective, on, outputs_of


class Regression(Objective):
    """Squared error on one number, or on a list of numbers, for a text or a pair of texts.

    Metrics: mean squared error, mean absolute error, R2 (the share of the variance explained), Pearson's correlation.
    """

    name = "regression"
    columns = (("text", "label"),)
    auto = "AutoModelForSequenceClassification"
    metrics = {"mse": False, "mae": False, "r2": True, "pearson": True, "loss": False}
    configured = ("num_labels", "problem_type")

    def __init__(self, model: nn.Module, processor: Any = None, **options: Any):
        super().__init__(model, processor, **options)
        self.max_length = limit(model, processor, self.max_length)

    @classmethod
    def outputs(cls, config: Any, examples: Examples | None, labels: Sequence[str] | None) -> dict[str, Any]:
        """As many outputs as a label has numbers; a model that has them already stays as it is."""
        wanted = 1 if examples is None else len(_numbers(column(examples, "label")[0], 0))
        known = getattr(config, "problem_type", None) == "regression" and config.num_labels == wanted
        return {} if known else {"num_labels": wanted, "problem_type": "regression"}

    @classmethod
    def suits(cls, columns: Sequence[str], example: Mapping[str, Any], architecture: str = "") -> bool:
        return super().suits(columns, example) and isinstance(example["label"], float)

    def features(self, examples: Examples) -> list[dict[str, Any]]:
        tokens = encoded(self.processor, examples, self.max_length)
        return [{**t, "labels": _numbers(v, row)} for row, (t, v) in enumerate(zip(tokens, column(examples, "label")))]

    def collate(self, features: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        return padded(self.processor, features, torch.float32)

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        said = outputs_of(model, batch).float()
        if said.shape != batch["labels"].shape:
            wanted = batch["labels"].shape[-1]
            raise GraftError(
                f"the model has {said.shape[-1]} outputs and a label {wanted}: load it with num_labels={wanted}"
            )
        return F.mse_loss(said, batch["labels"], reduction="sum"), said

    def terms(self, batch: dict[str, Tensor]) -> int:
        return batch["labels"].numel()

    def record(self, outputs: Tensor, batch: dict[str, Tensor]) -> dict[str, Any]:
        return {"said": outputs.tolist(), "true": batch["labels"].tolist()}

    def score(self, records: Sequence[dict[str, Any]], loss: float) -> dict[str, float]:
        said, true = (torch.tensor([x for r in records for x in r[k]], dtype=torch.float64) for k in ("said", "true"))
        a, b = said - said.mean(0), true - true.mean(0)
        spread = b.square().sum()
        return {
            "mse": float((said - true).square().mean()),
            "mae": float((said - true).abs().mean()),
            "r2": float(1 - (said - true).square().sum() / spread) if spread else float("nan"),
            "pearson": float(((a * b).sum(0) / (a.norm(dim=0) * b.norm(dim=0))).mean()),
            "loss": loss,
        }

    def predict(self, model: nn.Module, examples: Examples, **generation: Any) -> list[Any]:
        batch = padded(self.processor, encoded(self.processor, examples, self.max_length))
        return outputs_of(model, on(model, batch)).squeeze(-1).float().tolist()


def _numbers(value: Any, row: int) -> list[float]:
    try:
        return [float(v) for v in (value if isinstance(value, Sequence) and not isinstance(value, str) else [value])]
    except (TypeError, ValueError):
        raise GraftError(
            f"row {row} has the label {value!r}, which is not a number; for names use classification"
        ) from None
