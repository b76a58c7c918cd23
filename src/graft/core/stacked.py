"""Vectors of several rows in one tensor: shorter ones are filled up on the left."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import GraftError


def left_padded(rows: list[Tensor | None]) -> tuple[Tensor, Tensor | None]:
    """[..., n_i, size] of each row as [b, ..., n, size], and keep [b, n]: which of them are a row's own.

    A row without any (None) keeps nothing; keep is None where all rows fill all places.
    """
    given = [r for r in rows if r is not None]
    n = max(r.shape[-2] for r in given)
    full = [given[0].new_zeros(*given[0].shape[:-2], 0, given[0].shape[-1]) if r is None else r for r in rows]
    stacked = torch.stack([F.pad(r, (0, 0, n - r.shape[-2], 0)) for r in full])
    sizes = [r.shape[-2] for r in full]
    if min(sizes) == n:
        return stacked, None
    places = torch.arange(n, device=stacked.device)
    return stacked, places >= n - torch.tensor(sizes, device=stacked.device)[:, None]


def each_of(rows: Tensor, batch: int, path: str) -> Tensor:
    """[b, ...] as [batch, ...]: every row is that of batch / b neighbours."""
    return (
        rows.repeat_interleave(neighbours(batch, len(rows), path), 0)
        if len(rows) > 1
        else rows.expand(batch, *rows.shape[1:])
    )


def neighbours(batch: int, rows: int, path: str) -> int:
    """How many neighbours in a batch belong to one row of a route: beams, or tokens."""
    if batch % rows:
        raise GraftError(
            f"{path or 'the model'} gets {batch} rows, and the route has {rows}: give one name, or None, for each row"
        )
    return batch // rows
