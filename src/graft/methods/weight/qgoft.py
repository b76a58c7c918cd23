"""qGOFT: Parameter Efficient Quasi-Orthogonal Fine-Tuning via Givens Rotation. Ma et al., 2024."""

from typing import Annotated, Any

import torch
from torch import nn

from ...core.delta import Delta, Paper
from ...core.hyper import Range
from .orthogonal import fast_side, turned


class QGOFT(Delta, name="qgoft"):
    """W' = W R^T with R = P_L ... P_1, computed as f(x R): the inputs are turned, no matrix [in, in] is formed.

    P_l turns the planes of the features 2^l k and 2^l k + 2^(l-1), k = 0, 1, ...; all in - 1 planes of the L = log2(in)
    levels together make a tree, in which a plane costs a few operations per token. A number of features that is no
    power of two leaves the last one of a level over for the next. The five lowest levels are multiplied into blocks
    [32, 32] before they meet the inputs, where 32 divides `in`, the others into one thin product. With `strict` (GOFT)
    a plane is rotated by an angle, `angles` [in - 1], zero at first: R is orthogonal, and the angles between the rows
    of W stay. Otherwise (qGOFT) it has a free 2 x 2 matrix (alpha, beta), `planes` [in - 1, 2, 2], the identity at
    first, and gamma sum <alpha, beta>^2 over all planes is added to the loss.

    The formulas and the penalty are the paper's, the order of the levels and of their planes that of the first version
    of the authors' code (github.com/ArthurLeoM/peft-givens). That code takes pi tanh(.) of its parameters for angles
    and, with strict rotations, may scale the inputs too; its second version pairs neighbours at every level, unlike
    equation 3 of the paper. The paper tunes gamma and has no default.
    """

    papers = (
        Paper(
            "Parameter Efficient Quasi-Orthogonal Fine-Tuning via Givens Rotation",
            "Ma et al.",
            2024,
            "https://arxiv.org/abs/2404.04316",
        ),
    )
    known = (
        "Its authors report O(d) in place of OFT's O(d^2) parameters, with good results on various tasks and language "
        "models."
    )
    hosts = ("linear", "conv")
    angles: Any
    planes: Any

    def __init__(
        self,
        site,
        *,
        strict: Annotated[bool, "rotations alone (GOFT) instead of any 2 x 2 matrices"] = False,
        gamma: Annotated[
            float, "weight of the penalty which holds the 2 x 2 matrices near orthogonality", Range(0)
        ] = 0.01,
    ):
        super().__init__(site)
        count = site.d_in - 1
        self.angles = nn.Parameter(torch.zeros(count)) if strict else None
        self.planes = None if strict else nn.Parameter(torch.eye(2).repeat(count, 1, 1))
        self.gamma = gamma

    @classmethod
    def refuses(cls, site):
        return "it has one input, which leaves no plane to turn" if site.d_in < 2 else None

    def turns(self):
        """The 2 x 2 matrices [in - 1, 2, 2], level by level."""
        if self.planes is not None:
            return self.planes
        c, s = self.angles.cos(), self.angles.sin()
        return torch.stack([c, -s, s, c], -1).unflatten(-1, (2, 2))

    def prepare(self, inner):  # the inputs of a convolution are patches, which overlap
        return _parts(self.turns()) if self.site.kind == "linear" else super().prepare(inner)

    def act(self, inner, x, *prepared):
        if self.site.kind != "linear":
            return super().act(inner, x, *prepared)
        return inner(_turned(x, *prepared, add_up=self.site.add_up))

    def weight(self, w):
        P = self.turns()
        return _up(w.to(torch.promote_types(w.dtype, P.dtype)), P)

    @classmethod
    def penalty(cls, deltas):
        soft = [d for d in deltas if d.planes is not None and d.gamma]
        return torch.stack([d.gamma * d.planes.prod(-1).sum(-1).square().sum() for d in soft]).sum() if soft else None


def _pair(a, b, P):
    """The row vectors (a, b) times the matrices P [..., k, 2, 2]."""
    return a * P[..., 0, 0] + b * P[..., 1, 0], a * P[..., 0, 1] + b * P[..., 1, 1]


def _woven(a, b, rest):
    """a_1, b_1, a_2, b_2, ... and what is left over."""
    return torch.cat([torch.stack([a, b], -1).flatten(-2), rest], -1)


def _parts(P):
    """P alone, or how features are turned in two steps (None, blocks, up), with side for the side of the blocks:

    blocks [n / side, side, side], the levels which stay within `side` neighbours, then added to what they give
    up [n, n / side], or None for a single block, on every side-th feature, the roots of the blocks: the levels above.
    """
    n = len(P) + 1
    side = fast_side(1, n)
    if side < 4:
        return P, None, None
    blocks, roots = _blocks(P, n, side), n // side
    if roots == 1:
        return None, blocks, None
    eye = torch.eye(roots, dtype=P.dtype, device=P.device)
    moved = _turned(eye, *_parts(P[n - roots :])) - eye
    return None, blocks, (moved.T[:, None] * blocks[:, 0, :, None]).flatten(0, 1)


def _turned(x, P, blocks, up, add_up=lambda y, h, b: y + h @ b.T):
    """x P_L ... P_1 with what `_parts` gives."""
    if blocks is None:
        return _down(x, P.to(x.dtype))
    z = turned(x, blocks.to(x.dtype))
    return z if up is None else add_up(z, x[..., :: blocks.shape[-1]], up)


def _blocks(P, n, side):
    """The first log2(side) levels of n features, which stay within `side` neighbours: blocks [n / side, side, side].

    A plane joins the first rows of two parts: one of what it gives is the first row of both together, the other stays.
    """
    count, half, first = n // side, 1, P.new_ones(n, 1)
    R = P.new_zeros(count, side, side)
    while half < side:
        parts, size = side // (2 * half), 2 * half
        level, P = P[: count * parts], P[count * parts :]
        first, other = (level[..., None] * first.view(-1, 1, 2, half)).flatten(2).unbind(1)
        own = R.view(count, parts, size, parts, size).diagonal(0, 1, 3)  # [count, size, size, parts]
        own[:, half] = other.view(count, parts, size).mT
        half = size
    R[:, 0] = first.view(count, side)
    return R


def _down(x, P):
    """x P_L ... P_1 for P [..., n - 1, 2, 2]: the root of the tree first."""
    n = x.shape[-1]
    if n == 1:
        return x
    k = n // 2
    high = _down(x[..., ::2], P[..., k:, :, :])
    return _woven(*_pair(high[..., :k], x[..., 1::2], P[..., :k, :, :]), high[..., k:])


def _up(x, P):
    """x P_1^T ... P_L^T: the leaves first."""
    n = x.shape[-1]
    if n == 1:
        return x
    k = n // 2
    even = x[..., ::2]
    a, b = _pair(even[..., :k], x[..., 1::2], P[:k].mT)
    high = _up(torch.cat([a, even[..., k:]], -1), P[k:])
    return _woven(high[..., :k], b, high[..., k:])
