"""What kernels take within, beside what they give: only those which take much, where a dry run would not see it."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..core.sparse import by_entries


def _sampled_product(g: Tensor, x: Tensor, index: Tensor, *_: Tensor) -> int:
    """Both factors are copied: made contiguous, and in half precision wide before that."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if by_entries(g, x, index):
        return (1 + (x.dtype != wide)) * (g.numel() + x.numel()) * wide.itemsize
    return g.shape[1] * x.shape[1] * x.element_size()


WITHIN: dict[str, Callable[..., int]] = {
    "graft::sampled_product": _sampled_product,
    "graft::watched_product": _sampled_product,
}
