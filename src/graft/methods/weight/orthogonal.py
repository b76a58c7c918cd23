"""What orthogonal methods share: the Cayley transform, blocks that turn features, and thin changes of the inputs."""

import torch
from torch import Tensor

from ...core.delta import Delta
from ...core.sites.linear import small_product

WIDE = 32  # side of blocks from which products take no longer than their operands take to be read


def skew(triangles: Tensor, upper: Tensor, side: int) -> Tensor:
    """The skew-symmetric matrices [..., side, side] with the upper `triangles` [..., side (side - 1) / 2].

    `upper` is torch.triu_indices(side, side, 1).
    """
    Q = triangles.new_zeros(*triangles.shape[:-1], side, side)
    Q[..., upper[0], upper[1]] = triangles
    return Q - Q.mT


def cayley(Q: Tensor, terms: int | None = None) -> Tensor:
    """(I + Q) (I - Q)^-1, orthogonal for skew-symmetric Q [..., n, n]; with k `terms`, (I + Q) (I + Q + ... + Q^k)."""
    eye = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
    if terms is None:
        return 2 * torch.linalg.inv(eye - Q) - eye  # the same, and cheaper in backward than a solve
    series = eye + Q
    for _ in range(terms - 1):
        series = eye + Q @ series
    return series + Q @ series


def turned(x: Tensor, R: Tensor, level: int = 0) -> Tensor:
    """x times the blocks R [n, b, b], over the last axis [n b].

    At `level` 0 the blocks lie on the diagonal. At a higher one they hold the features of a butterfly of that level:
    a block takes half its features from each half of a part of 2^level b features, b / 2 neighbours each.
    """
    n, b = R.shape[:2]
    if level == 0:
        return torch.einsum("...nc,ncd->...nd", x.unflatten(-1, (n, b)), R).flatten(-2)
    parts, pairs = n >> level, 1 << level
    x = x.unflatten(-1, (parts, 2, pairs, b // 2))
    R = R.reshape(parts, pairs, 2, b // 2, 2, b // 2)
    return torch.einsum("...phkc,pkhcgd->...pgkd", x, R).flatten(-4)


def fast_side(part: int, size: int) -> int:
    """The side of the blocks by which features of `size` are turned fastest, `part` times a power of two."""
    while part < WIDE and size % (2 * part) == 0:
        part *= 2
    return part


def diagonal(R: Tensor, side: int, level: int = 0) -> Tensor:
    """The blocks R [n, b, b] of a butterfly level as blocks [n b / side, side, side] on the diagonal.

    `side` is a multiple of 2^level b. More zeros, and a product that takes less time where b is small.
    """
    b = R.shape[1]
    if level:
        half, pairs = b // 2, 1 << level
        eye = torch.eye(pairs, dtype=R.dtype, device=R.device)
        R = torch.einsum("pkhcgd,kl->phkcgld", R.view(-1, pairs, 2, half, 2, half), eye).reshape(-1, *2 * [b << level])
    count = side // R.shape[1]
    if count == 1:
        return R
    eye = torch.eye(count, dtype=R.dtype, device=R.device)
    return torch.einsum("pjcd,jl->pjcld", R.unflatten(0, (-1, count)), eye).reshape(-1, side, side)


def turned_inputs(inner, x: Tensor, rotations: list[tuple[Tensor, int]]) -> Tensor:
    """inner of x turned by the blocks R at the level of each (R, level), in this order."""
    dtype = small_product(x, rotations[0][0])
    z = x.to(dtype)
    for R, level in rotations:
        z = turned(z, R.to(dtype), level)
    return inner(z.to(x.dtype))


class Turned(Delta):
    """W' = W (I + B A), A [k, in] and B [in, k]: the inputs change by a thin product. No hyperparameters of its own."""

    hosts = ("linear", "conv")

    def __init__(self, site):
        super().__init__(site)
        self.passes_x = site.kind != "linear"  # the patches of a convolution overlap: its outputs are changed instead

    def turn(self) -> tuple[Tensor, Tensor]:
        """A and B."""
        raise NotImplementedError

    def prepare(self, inner):
        A, B = self.turn()
        if self.site.kind != "linear":
            w = inner.weight
            B = w @ B.to(w.dtype)
        return A, B

    def act(self, inner, x, A, B):
        h = self.site.down(x, A)
        return self.site.add_up(inner(x), h, B) if self.passes_x else inner(self.site.add_up(x, h, B))

    def weight(self, w):
        A, B = self.turn()
        return w + (w.to(torch.promote_types(w.dtype, B.dtype)) @ B) @ A
