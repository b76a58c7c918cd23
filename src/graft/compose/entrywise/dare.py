"""DARE: Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch. Yu et al., 2023,
https://arxiv.org/abs/2311.03099."""

from typing import Annotated

import torch
from torch import Tensor

from ...core.hyper import Range


def dare(
    changes: list[Tensor],
    *,
    density: Annotated[float, "share of the entries which are kept, 1 - p", Range(above=0, high=1)] = 0.1,
) -> Tensor:
    """sum_i m_i * change_i / density with random masks m_i: an entry is one with probability `density`, else zero.

    The expectation over the masks is the plain sum. The default drops p = 0.9, as the paper does.
    """
    return sum(dropped(change, density) for change in changes)  # type: ignore[return-value]


def dropped(change: Tensor, density: float) -> Tensor:
    """Each entry over `density` with this probability, else zero; drawn on the CPU, so alike on all devices."""
    keep = torch.rand(change.shape) < density
    return torch.where(keep.to(change.device), change / density, 0)
