"""SVFT: Parameter-Efficient Fine-Tuning with Singular Vectors. Lingam et al., 2024."""

from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from ...core.delta import Delta, Paper
from ...core.errors import GraftError
from ...core.hyper import Range
from .spectrum import Spectral


class SVFT(Spectral, name="svft"):
    """W' = W + U M V with the singular vectors U [out, k] and V [k, in] of W, frozen, and a sparse M [k, k], trained
    from zero at fixed places. k = min(in, out), or the largest `rank` triplets only. Computed as y + U (M (V x)).

    `pattern` says where M is trained:

        plain      the diagonal: k coefficients
        banded     the diagonal and d = `off_diagonals` on either side of it: n = k (2 d + 1) - d (d + 1) coefficients
        random     n places, drawn from the adapter's seed
        top_k      the n places (i, j) with the largest |u_i^T v_j|, of a square W only

    `value` holds the coefficients; U, V and the places are made anew and not saved. The paper takes the largest
    u_i^T v_j, whose signs are a convention of the decomposition off the diagonal. The authors' code
    (github.com/VijayLingam95/SVFT) draws places with repetition, starts at random small values instead of zero, and
    scales M by a trained gate.
    """

    papers = (
        Paper(
            "SVFT: Parameter-Efficient Fine-Tuning with Singular Vectors",
            "Lingam et al.",
            2024,
            "https://arxiv.org/abs/2405.19597",
        ),
    )
    known = (
        "Its authors report up to 96 % of full fine-tuning's result with 0.006 to 0.25 % of the parameters, where "
        "other methods reach 85 % with 0.03 to 0.8 %."
    )
    hosts = ("linear",)
    by_factors = False  # M V would be one more [k, in]
    neutral = {"value": 0.0}
    index: Tensor | None

    def __init__(
        self,
        site,
        *,
        pattern: Annotated[Literal["plain", "banded", "random", "top_k"], "where M is trained"] = "plain",
        off_diagonals: Annotated[
            int, "diagonals on either side of the main one, or as many coefficients", Range(0)
        ] = 2,
        rank: Annotated[int | None, "largest singular triplets to use; none: all", Range(1)] = None,
    ):
        super().__init__(site, rank)
        k = len(self.s)
        d = 0 if pattern == "plain" else min(off_diagonals, k - 1)
        count = k * (2 * d + 1) - d * (d + 1)
        self.value = nn.Parameter(torch.zeros(count))
        self.offsets = tuple(range(-d, d + 1)) if pattern in ("plain", "banded") else ()
        index = None
        if pattern == "random":
            index = torch.rand(k * k).topk(count).indices.sort().values
            self.neutral = Delta.neutral  # each adapter has its own places
        elif pattern == "top_k":
            if site.d_in != site.d_out:
                raise GraftError(
                    f"svft: the pattern top_k compares left with right singular vectors, which differ in size at "
                    f"{site.path} [{site.d_out}, {site.d_in}]; choose banded or random"
                )
            index = (self.U.T @ self.V.T).abs().flatten().topk(count).indices.sort().values
        self.register_buffer("index", index, persistent=False)

    def diagonals(self, value):
        """(offset, the coefficients on that diagonal) for those that are trained."""
        k = len(self.s)
        return zip(self.offsets, value.split([k - abs(o) for o in self.offsets]))

    def M(self):
        k = len(self.s)
        if self.index is not None:
            return _placed(self.value.new_zeros(k, k), self.value, self.index)
        return torch.stack([torch.diag_embed(v, o) for o, v in self.diagonals(self.value)]).sum(0)

    def factors(self):
        return self.M() @ self.V, self.U

    def prepare(self, inner):
        return self.V, self.U, self.value, self.index

    def act(self, inner, x, V, U, value, index):
        h = self.site.down(x, V)
        k = h.shape[-1]
        if index is not None:
            zeros = h.new_zeros(1).expand(k, k)
            z = self.site.apply_formed(h, _placed, zeros, None, value, index, pull=_gradients)
        else:
            z = torch.zeros_like(h)
            for o, v in self.diagonals(value.to(h.dtype)):
                z.narrow(-1, max(-o, 0), len(v)).add_(h.narrow(-1, max(o, 0), len(v)) * v)
        return self.site.add_up(inner(x), z, U)


def _placed(w, value, index):
    return w.reshape(-1).index_add(0, index, value).view(w.shape)


def _gradients(g, x, w, value, index):
    """dL/dvalue from g = dL/dz [n, k] and x [n, k]; none for the index."""
    return (g.mT @ x).flatten()[index].to(value.dtype), None
