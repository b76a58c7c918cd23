"""Digits that look or come otherwise at test time."""

import math
from dataclasses import dataclass
from random import Random
from typing import Annotated, Any, Literal

from ..core.hyper import Range
from . import Row
from .digits import Digits, grey, picture

DEGREES, SPREAD, FADING, WEIGHT = 12, 1.6, 0.18, 1.0  # at severity 1; grey goes from 0 to 16


@dataclass(frozen=True, kw_only=True)
class DigitsShifted(Digits):
    """The digits with a test split that is a stream of shifted images, in the order in which they arrive.

    At severity s, from 0 for none to 5: `rotation` turns images by 12 s degrees, counterclockwise, with linear
    interpolation; `noise` adds a normal number of standard deviation 1.6 s to each grey value, from 0 to 16, and cuts
    the result off there; `contrast` brings grey values by 18 s % nearer to the mean of the image; `labels` leaves the
    images as they are and changes how often digits come: at the share t of the stream the digit c is drawn from those
    that are left with the weight exp(s cos(2 pi (t - c / 10))) an image. In a `constant` stream s is `severity`, in a
    `rising` one it grows from 0 to `severity` along a line. A row tells its `severity`.
    """

    name = "digits-shifted"
    splits = {
        "train": "images as they are",
        "validation": "images as they are",
        "test": "the stream of shifted images",
        "clean": "the images of the stream as they are, in the same order",
    }
    digest = "bb4322908fe814fe7e67f2d4244bc60998b93a7d295a0d934b5b0323bdfa7ddf"

    shift: Annotated[Literal["rotation", "noise", "contrast", "labels"], "what changes"] = "rotation"
    severity: Annotated[float, "how much, at its highest", Range(0, 5)] = 3.0
    stream: Annotated[Literal["constant", "rising"], "how the severity goes over the stream"] = "constant"

    def generate(self) -> dict[str, list[Row]]:
        found = super().generate()
        last = len(found["test"]) - 1
        levels = [self.severity * (i / last if self.stream == "rising" else 1.0) for i in range(last + 1)]
        clean = self._arriving(found["test"], levels) if self.shift == "labels" else found["test"]
        draw, change = self.draw("noise"), CHANGES.get(self.shift)
        shifted = [
            {**row, "image": picture(change(grey(row), level, draw)) if change else row["image"], "severity": level}
            for row, level in zip(clean, levels)
        ]
        return {**found, "test": shifted, "clean": clean}

    def _arriving(self, rows: list[Row], levels: list[float]) -> list[Row]:
        draw, left, order = self.draw("labels"), list(rows), []
        for i, level in enumerate(levels):
            time = i / len(levels)
            weights = [math.exp(WEIGHT * level * math.cos(2 * math.pi * (time - int(r["label"]) / 10))) for r in left]
            order.append(left.pop(draw.choices(range(len(left)), weights)[0]))
        return order


def _rotated(image: Any, severity: float, draw: Random) -> Any:
    from scipy.ndimage import rotate

    return rotate(image, DEGREES * severity, reshape=False, order=1)


def _noisy(image: Any, severity: float, draw: Random) -> Any:
    import numpy as np

    return image + np.reshape([draw.gauss(0, SPREAD * severity) for _ in range(image.size)], image.shape)


def _faded(image: Any, severity: float, draw: Random) -> Any:
    return image + FADING * severity * (image.mean() - image)


CHANGES = {"rotation": _rotated, "noise": _noisy, "contrast": _faded}
