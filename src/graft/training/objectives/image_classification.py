"""Image classification."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...core.errors import GraftError
from ..data import Examples, column
from . import on, outputs_of
from .labelled import Labelled


class ImageClassification(Labelled):
    """A label for an image: a PIL image, an array, a path, or {"bytes": ...}. Images are read batch by batch."""

    name = "image-classification"
    columns = (("image", "label"),)
    auto = "AutoModelForImageClassification"

    def features(self, examples: Examples) -> "Images":
        return Images(examples, self.ids(examples))

    def collate(self, features: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        return {**self._pixels([f["image"] for f in features]), "labels": torch.tensor([f["labels"] for f in features])}

    def _pixels(self, images: Sequence[Any]) -> dict[str, Tensor]:
        return dict(self.processor([opened(i) for i in images], return_tensors="pt"))

    def predict(self, model: nn.Module, examples: Examples, **generation: Any) -> list[Any]:
        return self.named(outputs_of(model, on(model, self._pixels(column(examples, "image")))))


class Images(Sequence):
    """Examples with the numbers of their labels; an image is touched only when its example is."""

    def __init__(self, examples: Examples, labels: list[int]):
        self.examples, self.labels = examples, labels

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, i: Any) -> dict[str, Any]:
        return {"image": self.examples[i]["image"], "labels": self.labels[i]}


def opened(image: Any) -> Any:
    """The image itself, read if it is a path or bytes."""
    if isinstance(image, dict):
        image = io.BytesIO(image["bytes"]) if image.get("bytes") else image["path"]
    if not isinstance(image, str | Path | io.BytesIO):
        return image
    try:
        from PIL import Image
    except ImportError:
        raise GraftError("reading images needs pillow: pip install graft[images]") from None
    try:
        return Image.open(image).convert("RGB")
    except (OSError, ValueError) as error:
        raise GraftError(f"cannot read the image {image}: {error}") from error
