"""Handwritten digits."""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from ..core.errors import GraftError
from . import Reference, Row, Task
from .metrics import accuracy

VALIDATION, TEST = 240, 360  # images


@dataclass(frozen=True, kw_only=True)
class Digits(Task):
    """Tell which digit an image shows: 1,797 handwritten ones of 8 x 8 pixels.

    A row has `image`, an array [8, 8, 3] of bytes whose three channels are alike, as a file read in RGB would have;
    `label`, "0" to "9"; and `source`, the number of the image in scikit-learn's data.
    """

    name = "digits"
    sources = "Optical Recognition of Handwritten Digits, Alpaydin and Kaynak, 1998, https://doi.org/10.24432/C50P49, "
    sources += "its test part, as scikit-learn holds it (load_digits)"
    licence = "CC-BY-4.0"
    reference = Reference(base="graft:sprout", steps=150, batch_size=32, rows=512)
    splits = {
        "train": "images to learn from",
        "validation": "images to choose settings with",
        "test": "images to measure with",
    }
    metrics = (accuracy,)
    target = "label"
    digest = "4672280231c753d883e28fa9daac2c94500c17586a66ebf01fb07b33b644bc3f"

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple("0123456789")

    def items(self, row: Row) -> Iterable[Hashable]:
        """The image of scikit-learn's data."""
        return (row["source"],)

    def generate(self) -> dict[str, list[Row]]:
        images, labels = _data()
        # Not `draw`, which depends on the name: all tasks on digits have the same split.
        order = Digits(seed=self.seed).draw("split").sample(range(len(labels)), len(labels))
        rows = [{"image": picture(images[i]), "label": str(labels[i]), "source": i} for i in order]
        held = VALIDATION + TEST
        return {"train": rows[:-held], "validation": rows[-held:-TEST], "test": rows[-TEST:]}


def picture(grey: Any) -> Any:
    """[8, 8] from 0 to 16 as [8, 8, 3] from 0 to 255."""
    import numpy as np

    bright = np.rint(np.clip(grey, 0, 16) * 255 / 16).astype(np.uint8)
    return np.repeat(bright[..., None], 3, axis=-1)


@cache
def _data() -> tuple[Any, Sequence[int]]:
    """Images [n, 8, 8] of numbers from 0 to 16, and their digits."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise GraftError("the digits come with scikit-learn: pip install graft[demo]") from None
    data: Any = load_digits()
    return data.images, data.target.tolist()


def grey(row: Row) -> Any:
    """The image of a row as scikit-learn has it, [8, 8] from 0 to 16."""
    return _data()[0][row["source"]]
