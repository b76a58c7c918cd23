"""DARE before TIES, as the authors of DARE combine them: random entries instead of the largest ones."""

from typing import Annotated

from torch import Tensor

from ...core.hyper import Range
from .dare import dropped
from .ties import elected


def dare_ties(
    changes: list[Tensor],
    *,
    density: Annotated[float, "share of the entries which are kept, 1 - p", Range(above=0, high=1)] = 0.1,
) -> Tensor:
    """The mean of the entries which DARE kept and rescaled and whose sign is that of their sum, as in `ties`."""
    return elected([dropped(change, density) for change in changes])
