"""Images with labels: what the objectives on them share."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...core.errors import GraftError
from ..data import Examples, column
from .labelled import Labelled


class LabelledImages(Labelled):
    """Images are PIL images, arrays, paths, or {"bytes": ...}, and are read batch by batch.

    A model whose configuration says `num_channels` 1 gets them in grey.
    """

    columns = (("image", "label"),)

    def __init__(self, model: nn.Module, processor: Any = None, **options: Any):
        super().__init__(model, processor, **options)
        self.grey = getattr(getattr(model, "config", None), "num_channels", None) == 1

    def features(self, examples: Examples) -> "Images":
        return Images(examples, self.ids(examples))

    def collate(self, features: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        return {**self.pixels([f["image"] for f in features]), "labels": torch.tensor([f["labels"] for f in features])}

    def pixels(self, images: Sequence[Any]) -> dict[str, Tensor]:
        """What the model takes of images."""
        read = [opened(i) for i in images]
        return dict(self.processor([grey(i) for i in read] if self.grey else read, return_tensors="pt"))

    def pixels_of(self, examples: Examples) -> dict[str, Tensor]:
        """What the model takes of the images of examples."""
        return self.pixels(column(examples, "image"))


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


def grey(image: Any) -> np.ndarray:
    """An image as [height, width, 1] bytes: of colours the luma 0.299 R + 0.587 G + 0.114 B of ITU-R BT.601."""
    pixels = np.asarray(image)
    pixels = pixels if pixels.ndim == 3 else pixels[..., None]
    if pixels.shape[-1] == 1:
        return pixels
    return np.rint(pixels[..., :3] @ np.array([0.299, 0.587, 0.114])).astype(np.uint8)[..., None]
