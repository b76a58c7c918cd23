"""What a model is trained for: one file an objective, found by itself.

An objective turns examples into features, features into a batch, a batch into a sum of loss terms, and outputs into
metrics and predictions. A new one is a file here with a subclass of `Objective`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...core.errors import GraftError
from ...core.loading import load_all
from ..data import Examples, columns_of
from ..messages import nearest

OBJECTIVES: dict[str, type["Objective"]] = {}


class Objective(ABC):
    """One way to learn from data.

    name     by which users ask for it
    columns  the columns it reads; alternatives one after the other
    metrics  what `score` reports, and whether more is better; the first one decides unless another is named
    packs    whether several examples may share a row
    classes  whether the outputs of `loss` are logits [n, classes], a row for each term
    generates  whether a prediction is a text, which options of generation shape
    auto       the class of transformers that loads a model for it
    configured  what it needs to find in the configuration of such a model
    """

    name: ClassVar[str]
    columns: ClassVar[tuple[tuple[str, ...], ...]]
    metrics: ClassVar[dict[str, bool]]
    packs: ClassVar[bool] = False
    classes: ClassVar[bool] = False
    generates: ClassVar[bool] = False
    auto: ClassVar[str]
    configured: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        model: nn.Module,
        processor: Any = None,
        *,
        max_length: int | None = None,
        labels: Sequence[str] | None = None,
        packing: bool = False,
    ):
        """`processor` is a tokenizer or an image processor; `labels` the names of classes, where they are known."""
        if packing and not self.packs:
            raise GraftError(f"{self.name} cannot put several examples in a row: leave packing out")
        self.processor, self.max_length, self.labels, self.packing = processor, max_length, labels, packing

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if "name" in vars(cls):
            OBJECTIVES[cls.name] = cls

    @classmethod
    def suits(cls, columns: Sequence[str], example: Mapping[str, Any], architecture: str = "") -> bool:
        """Whether "auto" may choose this objective for such data and a model of that class."""
        return any(set(needed) <= set(columns) for needed in cls.columns)

    @classmethod
    def made_for(cls, architecture: str) -> bool:
        """Whether a class of models, such as LlamaForCausalLM, has its outputs."""
        return architecture.endswith(cls.auto.removeprefix("AutoModel"))

    @classmethod
    def outputs(cls, config: Any, examples: Examples | None, labels: Sequence[str] | None) -> dict[str, Any]:
        """What to change in the configuration of a model, before it is loaded, so that its outputs fit the data."""
        return {}

    def task(self, model: nn.Module) -> dict[str, Any]:
        """What to know of this objective in order to use the trained model again; saved with adapters, as JSON."""
        config = getattr(model, "config", None)
        known = {name: getattr(config, name) for name in self.configured if getattr(config, name, None) is not None}
        return {"objective": self.name, "config": known, "max_length": self.max_length}

    @abstractmethod
    def features(self, examples: Examples) -> Sequence[dict[str, Any]]:
        """What can be done once, before training: token ids, label ids. "input_ids" tell an example's length."""

    @abstractmethod
    def collate(self, features: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """A batch: the model's keywords, and "labels"."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The sum of the loss over the batch's terms (fp32), and the outputs that `record` reads."""

    @abstractmethod
    def terms(self, batch: dict[str, Tensor]) -> int:
        """Over how many terms the loss is a sum: examples or tokens. The optimizer sees the mean over a whole step."""

    @abstractmethod
    def record(self, outputs: Tensor, batch: dict[str, Tensor]) -> dict[str, Any]:
        """What `score` needs of one batch: plain numbers and lists."""

    @abstractmethod
    def score(self, records: Sequence[dict[str, Any]], loss: float) -> dict[str, float]:
        """The metrics over all batches, from their records and the mean loss."""

    @abstractmethod
    def predict(self, model: nn.Module, examples: Examples, **generation: Any) -> list[Any]:
        """What the model says about a batch of examples, which need no label."""


def find(name: str) -> type[Objective]:
    """The objective called `name`."""
    load_all(__name__)
    if name not in OBJECTIVES:
        raise GraftError(f"no objective is called {name!r}: {nearest(name, OBJECTIVES)}")
    return OBJECTIVES[name]


def guess(examples: Examples, architecture: str = "") -> type[Objective]:
    """The objective that the columns of the data speak for: of several the one that reads most of them, then the one
    that models of that class are made for."""
    find("classification")
    columns = columns_of(examples)
    fitting = [o for o in OBJECTIVES.values() if o.suits(columns, examples[0], architecture)]
    if not fitting:
        wanted = "; ".join(" + ".join(c) for o in OBJECTIVES.values() for c in o.columns)
        raise GraftError(
            f"no objective fits data with the columns {', '.join(columns)}; rename them to one of: {wanted}"
        )
    read = {o: max(len(c) for c in o.columns if set(c) <= set(columns)) for o in fitting}
    return max(fitting, key=lambda o: (read[o], o.made_for(architecture)))


def outputs_of(model: nn.Module, batch: Mapping[str, Tensor], **options: Any) -> Tensor:
    """The logits of one forward pass, of a transformers model or of any module that returns them."""
    out = model(**{k: v for k, v in batch.items() if k != "labels"}, **options)
    logits = out if torch.is_tensor(out) else getattr(out, "logits", None)
    if logits is None:
        raise GraftError(
            f"{type(model).__name__} has no outputs for a task: load it for one, such as objective='classification'"
        )
    return logits


def on(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch where the model is."""
    device = next(model.parameters()).device
    return {k: v.to(device) for k, v in batch.items()}


def named_classes(model: nn.Module) -> list[str] | None:
    """The names that the model's configuration gives its classes, unless they are the default ones."""
    return configured_classes(getattr(model, "config", None))


def configured_classes(config: Any) -> list[str] | None:
    """The names that a configuration gives its classes, unless they are the default LABEL_0, LABEL_1, ..."""
    names: Mapping[int, str] = getattr(config, "id2label", None) or {}
    listed = [names[i] for i in sorted(names)]
    return None if not listed or listed == [f"LABEL_{i}" for i in range(len(listed))] else listed


def name_classes(model: nn.Module, labels: Sequence[str] | None) -> None:
    """Write the names into the configuration, so that predictions made later use the same ones."""
    config: Any = getattr(model, "config", None)
    if labels and getattr(config, "num_labels", None) == len(labels):
        config.id2label, config.label2id = dict(enumerate(labels)), {name: i for i, name in enumerate(labels)}
