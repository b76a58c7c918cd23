"""Image classification."""

from typing import Any

from torch import nn

from ..data import Examples
from . import on, outputs_of
from .images import LabelledImages


class ImageClassification(LabelledImages):
    """A label for an image."""

    name = "image-classification"
    auto = "AutoModelForImageClassification"

    def predict(self, model: nn.Module, examples: Examples, **generation: Any) -> list[Any]:
        return self.named(outputs_of(model, on(model, self.pixels_of(examples))))
