"""LoKr: Low-rank Kronecker product, from LyCORIS. Yeh et al., 2023."""

import math
from typing import Annotated, Any

import torch
from torch import nn

from ...core.delta import Delta, Paper
from ...core.errors import GraftError
from ...core.formats.lycoris import ALPHA, Lycoris, check_size, kernel, matrix, tucker
from ...core.formats.peft import OWN, As, Peft, zero_padded
from ...core.hyper import Range
from ...core.sites.conv import tucker_form


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


class _Kronecker(Lycoris):
    """LyCORIS's LoKr, which ignores alpha where both factors are full, and makes W1 low-rank only where W2 is."""

    def fits(self, names):
        return super().fits(names) and bool({"lokr_w1", "lokr_w1_a"} & names)

    def write(self, delta):
        (a, c), (b, d) = delta.sizes
        if a > b or c > d:
            raise GraftError(f"LyCORIS's first factor is the smaller one, that of {delta.site.path} is not: {OWN}")
        found = super().write(delta)
        if delta.W2 is not None:
            left = delta.scaling * (delta.B1 @ delta.A1 if delta.W1 is None else delta.W1)
            return {"lokr_w1": left, "lokr_w2": found["lokr_w2"], ALPHA: left.new_tensor(1.0)}
        if delta.core2 is not None:
            found["lokr_w2_a"] = found["lokr_w2_a"].T.contiguous()
        return found | {ALPHA: delta.A2.new_tensor(delta.scaling * len(delta.A2))}

    def read(self, site, found):
        found = dict(found)
        alpha, core = found.pop(ALPHA, None), found.pop("lokr_t2", None)
        if core is not None:
            check_size(site, len(core), found["lokr_w2_b"].shape[1], *core.shape[2:])
            found["lokr_w2_a"] = found["lokr_w2_a"].T
        own = super().read(site, found)[1]
        ranks = {i: len(own[f"A{i}"]) for i in "12" if f"A{i}" in own}
        rank = ranks.get("2") or ranks.get("1")
        scaling = 1.0 if rank is None or alpha is None else float(alpha) / rank
        sizes = site.d_out, site.d_in // site.taps
        a, c = own["B1" if "B1" in own else "W1"].shape[0], own["A1" if "A1" in own else "W1"].shape[1]
        b, d = sizes[0] // a, sizes[1] // c
        factor = next((f for f in (-1, a, c) if tuple(factorize(n, f)[0] for n in sizes) == (a, c)), None)
        if factor is None:
            raise GraftError(f"the first factor of {site.path} is [{a}, {c}], to which no `factor` of LoKr leads")
        # Which factor is low-rank follows from one rank here; what does not is multiplied out.
        if rank is None or ("W2" in own) != (rank >= max(b, d) / 2):
            rank = math.ceil(max(b, d) / 2)
        low = {"1": ranks.get("1") == rank and rank < max(a, c) / 2, "2": rank < max(b, d) / 2}
        for i in "12":
            if f"B{i}" in own and not low[i]:
                if i == "2" and core is not None:
                    own["A2"], core = tucker(site, core, own["A2"]), None
                check_size(site, len(own[f"B{i}"]), own[f"A{i}"].shape[1])
                own[f"W{i}"] = own.pop(f"B{i}") @ own.pop(f"A{i}")
        hyper = {"rank": rank, "alpha": scaling * rank, "factor": factor, "decompose_both": low["1"]}
        return hyper | {"tucker": core is not None}, own if core is None else own | {"core2": core}


class _KroneckerPeft(Peft):
    """In Tucker form B2 is transposed."""

    def site_out(self, delta):
        found = super().site_out(delta)
        return found if delta.core2 is None else found | {"lokr_w2_a": found["lokr_w2_a"].T.contiguous()}

    def site_in(self, site, found, config):
        if "lokr_t2" in found:
            found = found | {"lokr_w2_a": found["lokr_w2_a"].T}
        return super().site_in(site, found, config)


class LoKr(Delta, name="lokr"):
    """W' = W + s W1 ⊗ W2 with W1 [a, c], W2 [b, d], out = a b, in = c d, s = alpha / rank, ⊗ the Kronecker product.

    W2 = B2 A2 with B2 [b, rank] and A2 [rank, d] where the rank is below max(b, d) / 2, else it is a full matrix; on
    request (`decompose_both`) W1 = B1 A1 likewise. W2, or its A2, is zero at the start and the rest Kaiming uniform.
    On activations the product is never formed: x is seen as a matrix X [c, d], and y + s W1 X W2^T as [a, b].
    Sizes are those of channels: a convolution's W2 also holds the kernel, [b, d * kernel]. With `tucker`, a low-rank W2
    with a kernel larger than 1 takes the Tucker form: A2 [rank, d] sees single positions, and `core2` [rank, rank,
    kernel ...] (Kaiming uniform) makes a matrix [rank, d * kernel] of it.
    """

    papers = (
        Paper(
            "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation",
            "Yeh et al.",
            2023,
            "https://arxiv.org/abs/2309.14859",
        ),
    )
    known = "The authors of LyCORIS study it in text-to-image models, with no figures in their abstract."
    passes_x = True
    small = dict(rank=1)
    peft = _KroneckerPeft(
        "LOKR",
        {
            "W1": As("lokr_w1", optional=True),
            "B1": As("lokr_w1_a", optional=True),
            "A1": As("lokr_w1_b", optional=True),
            "W2": As("lokr_w2", _with_kernel, _flat, optional=True),
            "B2": As("lokr_w2_a", zero_padded, zero_padded, optional=True),
            "A2": As("lokr_w2_b", optional=True),
            "core2": As("lokr_t2", optional=True),
        },
        config={
            "r": "rank",
            "alpha": "alpha",
            "decompose_both": "decompose_both",
            "decompose_factor": "factor",
            "use_effective_conv2d": "tucker",
        },
        defaults={"use_effective_conv2d": False},
        patterns={"rank_pattern": "r", "alpha_pattern": "alpha"},
        neutral=frozenset({"rank_dropout", "rank_dropout_scale", "module_dropout", "init_weights"}),
        hosts=("Linear", "Conv1d", "Conv2d"),
    )
    lycoris = _Kronecker(
        {
            "W1": As("lokr_w1", optional=True),
            "B1": As("lokr_w1_a", optional=True),
            "A1": As("lokr_w1_b", optional=True),
            "W2": As("lokr_w2", kernel, matrix, optional=True),
            "B2": As("lokr_w2_a", optional=True),
            "A2": As("lokr_w2_b", optional=True),
            "core2": As("lokr_t2", optional=True),
        },
        also=frozenset({ALPHA}),
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
        tucker: Annotated[bool, "on kernels of convolutions, take the Tucker form of a low-rank W2"] = False,
    ):
        super().__init__(site)
        (a, b), (c, d) = factorize(site.d_out, factor), factorize(site.d_in // site.taps, factor)
        low1, low2 = decompose_both and rank < max(a, c) / 2, rank < max(b, d) / 2
        self.W1, self.B1, self.A1 = self._factor(a, c, rank if low1 else None)
        tucker = tucker and low2 and site.taps > 1
        self.W2, self.B2, self.A2 = self._factor(b, d if tucker else d * site.taps, rank if low2 else None)
        self.core2 = None
        if tucker:
            core = torch.empty(rank, rank, *site.module.kernel_size)
            self.core2 = nn.Parameter(nn.init.kaiming_uniform_(core, a=5**0.5))
        nn.init.zeros_(self.A2 if low2 else self.W2)
        self.scaling = alpha / rank
        self.sizes = (a, c), (b, d)

    def _factor(self, rows, columns, rank) -> tuple[Any, Any, Any]:
        """(a full matrix, None, None) or (None, B, A)."""
        shapes = [(rows, columns)] if rank is None else [(rows, rank), (rank, columns)]
        made = [nn.Parameter(nn.init.kaiming_uniform_(torch.empty(s), a=5**0.5)) for s in shapes]
        return (made[0], None, None) if rank is None else (None, made[0], made[1])

    def prepare(self, inner):
        """s W1 [a, c], and the one or two matrices whose product is W2 [b, d], the innermost first."""
        left = self.B1 @ self.A1 if self.W1 is None else self.W1
        if self.W2 is not None:
            return self.scaling * left, self.W2
        return self.scaling * left, self.A2 if self.core2 is None else tucker_form(self.core2, self.A2), self.B2

    def act(self, inner, x, left, *right):
        return inner(x) + self.site.kron(x, left, right)

    def weight(self, w):
        left, right, *rest = self.prepare(None)
        for m in rest:
            right = m @ right
        return w + torch.kron(left, right)
