"""TIES-Merging: Resolving Interference When Merging Models. Yadav et al., 2023, https://arxiv.org/abs/2306.01708."""

from typing import Annotated

import torch
from torch import Tensor

from ...core.hyper import Range
from .magnitude import trimmed


def ties(
    changes: list[Tensor],
    *,
    density: Annotated[float, "share of the entries which are kept", Range(above=0, high=1)] = 0.2,
) -> Tensor:
    """Trim, elect sign, disjoint mean.

    Of each change the `density` largest |entries| are kept, tensor by tensor. An entry of the result is the mean of
    the kept entries whose sign is that of their sum; where the sum is zero, so is the result. The default is the
    paper's.
    """
    return elected([trimmed(change, density) for change in changes])


def elected(changes: list[Tensor]) -> Tensor:
    """The mean, entry by entry, of the values whose sign is that of the sum of all."""
    values = torch.stack(changes)
    total = values.sum(0)
    agree = (values.sign() == total.sign()) & (values != 0)
    return torch.where(agree, values, 0).sum(0) / agree.sum(0).clamp(min=1)
