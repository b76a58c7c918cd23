"""Digits whose classes arrive in steps."""

from dataclasses import dataclass
from typing import Annotated

from ..core.hyper import Range
from . import Row
from .digits import Digits
from .steps import in_steps


@dataclass(frozen=True, kw_only=True)
class DigitsIncremental(Digits):
    """The digits in `steps` of different classes, for continual learning; the rows are those of one `step`.

    Which classes arrive when is drawn by the seed. The labels are always all ten, so that a classifier can have all its
    outputs from the beginning. The split of the images is that of `digits` with the same seed.
    """

    name = "digits-incremental"
    splits = {
        "train": "images of this step's classes to learn from",
        "validation": "images of this step's classes to choose settings with",
        "test": "images of this step's classes to measure with",
        "seen": "the test images of this step and of all before it",
    }
    digest = "d78cad83b3512704f211f078e00e02249a72977d74183b4025e584da9e097aac"

    steps: Annotated[int, "how many steps the classes are divided into", Range(1, 10)] = 5
    step: Annotated[int, "which of the steps, from 1", Range(1)] = 1

    def generate(self) -> dict[str, list[Row]]:
        return in_steps(self, super().generate(), self.steps, self.step)
