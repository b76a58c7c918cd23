"""Classes and their names: what text and image classification share."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...core.errors import GraftError
from ..data import Examples, column
from . import Objective, configured_classes, named_classes, outputs_of


class Labelled(Objective):
    """Cross entropy over classes. Metrics: accuracy, and F1 averaged over the classes that occur."""

    metrics = {"accuracy": True, "f1": True, "loss": False}
    classes = True
    configured = ("num_labels", "id2label", "label2id")

    def __init__(self, model: nn.Module, processor: Any = None, **options: Any):
        super().__init__(model, processor, **options)
        self.labels = self.labels or named_classes(model)

    @classmethod
    def outputs(cls, config: Any, examples: Examples | None, labels: Sequence[str] | None) -> dict[str, Any]:
        """As many outputs as classes, with their names; a model that knows the classes of the data stays as it is."""
        if labels is None and examples is None:
            return {}
        values = [] if examples is None else column(examples, "label")
        names = labels or (examples is not None and _classes(examples)) or label_names(values)
        known = configured_classes(config) or []
        if labels is None and {str(n) for n in names} <= set(map(str, known)):
            return {}
        return {
            "num_labels": len(names),
            "id2label": {i: str(n) for i, n in enumerate(names)},
            "label2id": {str(n): i for i, n in enumerate(names)},
        }

    def ids(self, examples: Examples) -> list[int]:
        """The label of each example as a number; names are taken from the data if they are not known yet."""
        values = column(examples, "label")
        classes = _classes(examples)
        if classes and isinstance(values[0], int):
            values = [classes[v] for v in values]
        self.labels = self.labels or classes or label_names(values)
        number = {str(name): i for i, name in enumerate(self.labels)}
        if row := next(((i, v) for i, v in enumerate(values) if str(v) not in number), None):
            if isinstance(row[1], int) and all(isinstance(v, int) and 0 <= v < len(number) for v in values):
                return list(values)
            raise GraftError(f"row {row[0]} has the label {row[1]!r}, which is none of {', '.join(map(str, number))}")
        return [number[str(v)] for v in values]

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        logits = outputs_of(model, batch).float()
        known = len(self.labels or ())
        if logits.shape[-1] != known:
            raise GraftError(
                f"the model has {logits.shape[-1]} outputs and the data {known} labels: "
                f"load the model with num_labels={known}"
            )
        return F.cross_entropy(logits, batch["labels"], reduction="sum"), logits

    def terms(self, batch: dict[str, Tensor]) -> int:
        return len(batch["labels"])

    def record(self, outputs: Tensor, batch: dict[str, Tensor]) -> dict[str, Any]:
        return {"said": outputs.argmax(-1).tolist(), "true": batch["labels"].tolist()}

    def score(self, records: Sequence[dict[str, Any]], loss: float) -> dict[str, float]:
        said, true = (torch.tensor([x for r in records for x in r[k]]) for k in ("said", "true"))
        f1 = []
        for c in sorted({*said.tolist(), *true.tolist()}):
            hits = int(((said == c) & (true == c)).sum())
            f1.append(2 * hits / int((said == c).sum() + (true == c).sum()))
        return {"accuracy": float((said == true).double().mean()), "f1": sum(f1) / len(f1), "loss": loss}

    def named(self, logits: Tensor) -> list[dict[str, Any]]:
        """The likeliest label of each row with its probability."""
        best = logits.float().softmax(-1).max(-1)
        names = self.labels or list(range(logits.shape[-1]))
        return [{"label": names[i], "probability": p} for i, p in zip(best.indices.tolist(), best.values.tolist())]


def label_names(values: Sequence[Any]) -> list[str]:
    """The distinct labels as names: numbers by size, from 0 where they are numbers of classes, the rest by alphabet."""
    distinct = set(values)
    if all(isinstance(v, bool) for v in distinct):
        return ["False", "True"]
    if all(isinstance(v, int) for v in distinct):
        dense = min(distinct) == 0 and max(distinct) < 2 * len(distinct)
        return [str(v) for v in (range(max(distinct) + 1) if dense else sorted(distinct))]
    return sorted(map(str, distinct))


def _classes(examples: Examples) -> list[str] | None:
    """The names of the classes where the data knows them: the rows of a task, or the columns of a `Dataset`."""
    feature = (getattr(examples, "features", None) or {}).get("label")
    known = getattr(examples, "labels", None) or getattr(feature, "names", None)
    return list(known) if known else None
