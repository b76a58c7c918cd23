"""SNELLA: Kernelized Sparse Fine-Tuning with Bi-level Parameter Competition for Vision Models. Shen et al., 2025."""

from typing import Annotated

import torch
from torch import Tensor, nn

from ...core.delta import Paper
from ...core.errors import GraftError
from ...core.hyper import Range
from ...core.sensitivity import Sensitive
from ...core.sparse import exceeded_by

_SCALE = 0.1  # of the two kernels, as the authors have it


class SNELLA(Sensitive, name="snella"):
    """W' = W + S(D), D [out, in] of high rank from rank (out + in) numbers, S(D) sparse.

    A [2, in, rank / 2] and B [2, out, rank / 2] give two distances for each entry, whose difference is no product of
    thin factors:

        K[i, j] = 0.1 (||B[0, i] - A[0, j]|| - ||B[1, i] - A[1, j]||)
        D[i, j] = K[i, j] + p exp(K[i, j] / t) / sum over i of exp(K[i, j] / t) + q
        S(D) = D |D|  at the entries with the largest |D| of the matrix, 0 at all others; |D| counts as constant

    p = t = 1 and q = 0 at the start are trained, too. A and B start at random (Kaiming uniform): D is small, not zero.
    W' is formed, and formed again for backward; what is kept is A and B, in the optimizer as well.

    How many entries a matrix may change is decided while it learns. Of all matrices together the share that may be
    changed falls from 1 to `density` as (1 - t)^3, between the shares `warmup` and 1 - `cooldown` of training. Each
    matrix gets a part in proportion to its importance, up to all of its entries, what is left over going to the others
    by the same rule. Importance is the mean over A of the scores J U of its entries plus that over B (AdaLoRA's, from
    the smoothed sensitivity |w dL/dw| and its uncertainty).

    Formulas and defaults are those of the authors' code (github.com/ssfgunner/SNELL, `SNELLA` in
    model/vision_transformer_timm.py, sparse_allocator.py and the scripts of SNELLA-32), which shares out anew in each
    epoch, here in each step; `density` is 0.1 to 0.7 there, by data set.
    """

    papers = (
        Paper(
            "Kernelized Sparse Fine-Tuning with Bi-level Parameter Competition for Vision Models",
            "Shen et al.",
            2025,
            "https://arxiv.org/abs/2510.24037",
        ),
        Paper("Expanding Sparse Tuning for Low Memory Usage", "Shen et al.", 2024, "https://arxiv.org/abs/2411.01800"),
    )
    known = (
        "Its authors report 91.9 % on FGVC against 90.1 % for SPT with LoRA, with 31.1 to 39.9 % less memory than "
        "earlier sparse methods on vision models."
    )
    starts_as_base = False
    small = dict(rank=4, density=0.5)
    count: Tensor

    def __init__(
        self,
        site,
        *,
        rank: Annotated[int, "numbers for an input or an output, half of them for each distance", Range(2)] = 32,
        density: Annotated[float, "share of the entries that may change at the end", Range(above=0, high=1)] = 0.2,
        warmup: Annotated[float, "share of training before it falls", Range(0, below=1)] = 0.0,
        cooldown: Annotated[float, "share of training after it has fallen", Range(0, below=1)] = 0.0,
        beta1: Annotated[float, "smoothing of the sensitivity", Range(above=0, below=1)] = 0.85,
        beta2: Annotated[float, "smoothing of the uncertainty", Range(above=0, below=1)] = 0.85,
    ):
        if rank % 2:
            raise GraftError(f"snella: rank must be even, half of it for each distance, not {rank}")
        if warmup + cooldown >= 1:
            raise GraftError(f"snella: warmup + cooldown must be below 1, not {warmup + cooldown:g}")
        super().__init__(site)
        self.A = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(2, site.d_in, rank // 2), a=5**0.5))
        self.B = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(2, site.d_out, rank // 2), a=5**0.5))
        self.p, self.t, self.q = (nn.Parameter(torch.full((1,), v)) for v in (1.0, 1.0, 0.0))
        self.register_buffer("count", torch.tensor(site.d_out * site.d_in))
        self.density, self.warmup, self.cooldown = density, warmup, cooldown
        self.follow(("A", "B"), beta1, beta2)

    def forward(self, inner, x):
        tensors = self.A, self.B, self.p, self.t, self.q, self.count
        if x.dtype.itemsize >= 4:
            return self.site.apply_formed(x, _changed, inner.weight, self.bias(inner.bias), *tensors)
        # W + S(D) in half precision would round the change away.
        return inner(x) + self.site.apply_formed(x, _change, inner.weight, None, *tensors)

    def weight(self, w):
        return _changed(w, self.A, self.B, self.p, self.t, self.q, self.count)

    @classmethod
    @torch.no_grad()
    def step(cls, deltas, progress):
        one, sizes = deltas[0], [d.site.d_out * d.site.d_in for d in deltas]
        for d in deltas:
            d.observe()
        phase = (progress - one.warmup) / (1 - one.warmup - one.cooldown)
        left = (1 - min(max(phase, 0.0), 1.0)) ** 3
        total = round(sum(n * (d.density + (1 - d.density) * left) for d, n in zip(deltas, sizes)))
        importance = [torch.stack([s.mean() for s in d.scores()]).sum() for d in deltas]
        for d, count in zip(deltas, shared_out(total, torch.stack(importance), sizes)):
            d.count.fill_(count)


def shared_out(total: int, weights: Tensor, most: list[int]) -> list[int]:
    """`total` things in proportion to `weights` [k], none negative, and no more than most[i] of them to i."""
    room = torch.tensor(most, dtype=torch.float64)
    parts = weights.double().cpu()
    parts = parts.clamp(min=1e-12 * float(parts.max())) if parts.any() else torch.ones_like(room)
    # Those with the least room for their weight are full first; the level is how much the others get for theirs.
    order = (room / parts).argsort()
    full = room[order].cumsum(0) - room[order]
    levels = (total - full) / parts[order].flip(0).cumsum(0).flip(0)
    level = levels[int((levels <= (room / parts)[order] * (1 + 1e-9)).to(torch.uint8).argmax())]
    exact = torch.minimum(room, level * parts)
    counts = (exact + 1e-6).floor()
    rest = torch.where(counts < room, exact - counts, -1.0)
    counts[rest.topk(max(0, total - int(counts.sum()))).indices] += 1
    return [int(n) for n in counts]


def _parts(A: Tensor, B: Tensor, p: Tensor, t: Tensor, q: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """D and |D|, the latter zero where nothing changes."""
    wide = torch.promote_types(A.dtype, torch.float32)
    A, B, p, t, q = (v.to(wide) for v in (A, B, p, t, q))
    # By products, [2, out, in]; it keeps the distances alone for backward.
    first, second = torch.cdist(_SCALE * B, _SCALE * A, compute_mode="use_mm_for_euclid_dist")
    K = first - second
    D = torch.addcmul(K + q, p, (K * t.reciprocal()).softmax(0))
    size = D.detach().abs()
    return D, size * (size > exceeded_by(size, count))


def _change(w: Tensor, *tensors: Tensor) -> Tensor:
    D, kept = _parts(*tensors)
    return (D * kept).to(w.dtype)


def _changed(w: Tensor, *tensors: Tensor) -> Tensor:
    wide = torch.promote_types(w.dtype, tensors[0].dtype)
    return torch.addcmul(w.to(wide), *(v.to(wide) for v in _parts(*tensors)))
