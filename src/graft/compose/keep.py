"""How a change is kept: the hyperparameters and tensors of a method that computes it, and what that loses."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.errors import GraftError
from ..core.sites.linear import LinearSite
from .change import Change, LowRank, added, dense, scaled, size, svd

EXACT = 1e-5  # a loss up to this share of the change is rounding


class Loss(NamedTuple):
    """Frobenius norms at one module: of the change, of what is missing of it, and of rounding in it."""

    size: float = 0.0
    lost: float = 0.0
    rounding: float = 0.0

    @property
    def error(self) -> float:
        return self.lost / self.size if self.size else 0.0

    @property
    def exact(self) -> bool:
        return self.lost <= max(EXACT * self.size, self.rounding)


class Kept(NamedTuple):
    """One module of the new adapter: the hyperparameters and tensors of its delta."""

    hyper: dict[str, Any]
    tensors: dict[str, Tensor]
    loss: Loss = Loss()


def as_lora(site: LinearSite, change: Change, rank: int | None = None) -> Kept:
    """A LoRA of `rank` at most, the nearest one in the Frobenius norm, from the singular values.

    Without a rank factors stay as they are, and of a matrix the rank is that which loses nothing but rounding. alpha is
    the rank, so that the scaling is one.
    """
    matrix, lost = change.matrix, 0.0
    if not isinstance(matrix, LowRank) or (rank is not None and rank < len(matrix.A)):
        U, S, V = svd(matrix)
        beyond = S.square().flip(0).cumsum(0).flip(0).sqrt()  # [i]: what is lost without the values from i on
        rounding = (torch.finfo(S.dtype).eps * beyond[:1]).clamp(min=change.rounding)
        needed = int((beyond > rounding).sum())
        keep = needed if rank is None else min(rank, needed)
        root = S[:keep].sqrt()
        matrix = LowRank(root[:, None] * V[:keep], U[:, :keep] * root)
        lost = size(_difference(change.matrix, matrix))
    if not len(matrix.A):
        matrix = LowRank(matrix.A.new_zeros(1, site.d_in), matrix.B.new_zeros(site.d_out, 1))
    tensors = {"A": matrix.A, "B": matrix.B}
    if change.bias is not None:
        tensors["c"] = change.bias
    count = len(matrix.A)
    hyper = {"rank": count, "alpha": float(count), "bias": change.bias is not None}
    whole = math.hypot(size(change.matrix), 0.0 if change.bias is None else size(change.bias))
    return Kept(hyper, tensors, Loss(whole, lost, change.rounding))


def as_shira(site: LinearSite, change: Change) -> Kept:
    """The entries of dW which are not zero, at their places: nothing is lost."""
    if change.bias is not None:
        raise GraftError(f'shira changes no bias, and that of {site.path} changes: choose into="lora" or into="full"')
    flat = dense(change.matrix).flatten()
    index = flat.nonzero().flatten()
    index = index if len(index) else index.new_zeros(1)
    tensors = {"value": flat[index], "index": index}
    return Kept({"density": len(index) / len(flat)}, tensors, Loss(size(flat)))


def _difference(a: Tensor | LowRank, b: LowRank) -> Tensor | LowRank:
    return added([a, scaled(b, -1)]) if isinstance(a, LowRank) else torch.addmm(a, b.B, b.A, alpha=-1)
