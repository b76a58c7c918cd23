"""Magnitude pruning."""

from typing import Annotated

import torch
from torch import Tensor

from ...core.hyper import Range


def magnitude(
    changes: list[Tensor], *, density: Annotated[float, "share of the entries which are kept", Range(above=0, high=1)]
) -> Tensor:
    """sum_i of the largest |entries| of change i; `density` of them are kept, tensor by tensor, the rest is zero."""
    return sum(trimmed(change, density) for change in changes)  # type: ignore[return-value]


def trimmed(change: Tensor, density: float) -> Tensor:
    """The `density` largest |entries| of a tensor in their places, zero elsewhere."""
    flat = change.flatten()
    kept = flat.abs().topk(round(density * flat.numel())).indices
    return torch.zeros_like(flat).index_copy(0, kept, flat[kept]).view(change.shape)
