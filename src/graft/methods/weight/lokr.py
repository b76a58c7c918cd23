"""LoKr: Low-rank Kronecker product, from LyCORIS. Yeh et al., 2023."""

import math
from typing import Annotated, Any

import torch
from torch import nn

from ...core.delta import Delta, Paper
from ...core.hyper import Range
from ...core.peft import As, Peft, zero_padded


def _with_kernel(site, W2):
    """[b, d, kernel ...] of a convolution for [b, d * kernel]."""
    W2 = zero_padded(site, W2)
    return W2.reshape(len(W2), -1, *site.module.kernel_size) if site.kind == "conv" else W2


def _flat(site, value):
    return zero_padded(site, value).flatten(1)


def factorize(size: int, factor: int = -1) -> tuple[int, int]:
    """(m, n) with m n = size: m = factor where that divides, else the largest divisor up to `factor` with m <= n.

    factor = -1 sets no limit, which gives the pair nearest to a square: 512 = 16 * 32.
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = min(math.isqrt(size), factor if factor > 0 else size)
    m = next(m for m in range(limit, 0, -1) if size % m == 0)
    return m, size // m


class LoKr(Delta, name="lokr"):
    """W' = W + s W1 ⊗ W2 with W1 [a, c], W2 [b, d], out = a b, in = c d, s = alpha / rank, ⊗ the Kronecker product.

    W2 = B2 A2 with B2 [b, rank] and A2 [rank, d] where the rank is below max(b, d) / 2, else it is a full matrix; on
    request (`decompose_both`) W1 = B1 A1 likewise. W2, or its A2, is zero at the start and the rest Kaiming uniform.
    On activations the product is never formed: x is seen as a matrix X [c, d], and y + s W1 X W2^T as [a, b].
    Sizes are those of channels: a convolution's W2 also holds the kernel, [b, d * kernel].
    """

    papers = (
        Paper(
            "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation",
            "Yeh et al.",
            2023,
            "https://arxiv.org/abs/2309.14859",
        ),
    )
    small = dict(rank=1)
    peft = Peft(
        "LOKR",
        {
            "W1": As("lokr_w1", optional=True),
            "B1": As("lokr_w1_a", optional=True),
            "A1": As("lokr_w1_b", optional=True),
            "W2": As("lokr_w2", _with_kernel, _flat, optional=True),
            "B2": As("lokr_w2_a", zero_padded, zero_padded, optional=True),
            "A2": As("lokr_w2_b", optional=True),
        },
        config={"r": "rank", "alpha": "alpha", "decompose_both": "decompose_both", "decompose_factor": "factor"},
        patterns={"rank_pattern": "r", "alpha_pattern": "alpha"},
        neutral=frozenset(
            {"rank_dropout", "rank_dropout_scale", "module_dropout", "use_effective_conv2d", "init_weights"}
        ),
        hosts=("Linear", "Conv1d", "Conv2d"),
    )

    def __init__(
        self,
        site,
        *,
        rank: Annotated[int, "rank of the factors that are low-rank", Range(1)] = 8,
        alpha: Annotated[float, "numerator of the scaling s"] = 8.0,
        factor: Annotated[
            int, "size a and c of W1, or the limit of it; -1 for the nearest to a square", Range(-1)
        ] = -1,
        decompose_both: Annotated[bool, "make W1 low-rank too, where the rank is below max(a, c) / 2"] = False,
    ):
        super().__init__(site)
        (a, b), (c, d) = factorize(site.d_out, factor), factorize(site.d_in // site.taps, factor)
        low1, low2 = decompose_both and rank < max(a, c) / 2, rank < max(b, d) / 2
        self.W1, self.B1, self.A1 = self._factor(a, c, rank if low1 else None)
        self.W2, self.B2, self.A2 = self._factor(b, d * site.taps, rank if low2 else None)
        nn.init.zeros_(self.A2 if low2 else self.W2)
        self.scaling = alpha / rank

    def _factor(self, rows, columns, rank) -> tuple[Any, Any, Any]:
        """(a full matrix, None, None) or (None, B, A)."""
        shapes = [(rows, columns)] if rank is None else [(rows, rank), (rank, columns)]
        made = [nn.Parameter(nn.init.kaiming_uniform_(torch.empty(s), a=5**0.5)) for s in shapes]
        return (made[0], None, None) if rank is None else (None, made[0], made[1])

    def parts(self):
        """s W1 [a, c], and the one or two matrices whose product is W2 [b, d], the innermost first."""
        left = self.B1 @ self.A1 if self.W1 is None else self.W1
        return self.scaling * left, (self.A2, self.B2) if self.W2 is None else (self.W2,)

    def forward(self, inner, x):
        return inner(x) + self.site.kron(x, *self.parts())

    def weight(self, w):
        left, (right, *rest) = self.parts()
        for m in rest:
            right = m @ right
        return w + torch.kron(left, right)
