"""SAID: Intrinsic Dimensionality Explains the Effectiveness of Language Model Fine-Tuning. Aghajanyan et al., 2020."""

import math
from collections.abc import Callable, Iterable
from typing import Annotated

import torch
from torch import Tensor, nn

from ...core.delta import Delta, Paper
from ...core.errors import GraftError
from ...core.hyper import Range

_BLOCK = 32  # of the Hadamard matrices that are multiplied with as such


class SAID(Delta, name="said"):
    """W' = W + lam P(theta), where theta is one vector for all sites and P a fixed random map of it onto [out, in].

    P is the Fastfood transform: the first out in entries of H G Pi H S theta / (||G|| sqrt(out in)), with theta filled
    up with zeros (or cut) to the next power of two from out in, S random signs, H the Walsh-Hadamard matrix of entries
    1 and -1, Pi a random permutation, and G a diagonal of normal random numbers. None of them is stored. Of the
    `dimension` trained numbers one for each site is its factor lam, which starts at one (structure-aware intrinsic
    dimension); the rest is theta, which starts at zero, so that the adapted model starts as the base. Without
    `structure_aware` all of them are theta (direct intrinsic dimension). As in the code of the paper's author that
    Compacter has, which spends one number less. W' is formed in every step, and 8 to 16 bytes an entry are kept in
    memory: it is made for measuring, see `intrinsic_dimension`.
    """

    papers = (
        Paper(
            "Intrinsic Dimensionality Explains the Effectiveness of Language Model Fine-Tuning",
            "Aghajanyan, Zettlemoyer, Gupta",
            2020,
            "https://arxiv.org/abs/2012.13255",
        ),
    )
    known = (
        "Its authors report 90 % of full fine-tuning's result on MRPC with 200 trained numbers in RoBERTa, and fewer "
        "needed the larger the model. It was made to measure how many are needed."
    )
    small = dict(dimension=40)
    index: Tensor
    signs: Tensor
    gains: Tensor

    @classmethod
    def share(cls, sites, *, dimension, structure_aware, **_):
        length = dimension - len(sites) * structure_aware
        if length < 1:
            raise GraftError(
                f"said: dimension {dimension} leaves nothing for theta beside the factors of {len(sites)} sites: take "
                f"more, or structure_aware=False"
            )
        shared = nn.Module()
        shared.theta = nn.Parameter(torch.zeros(length))
        return shared

    def __init__(
        self,
        site,
        shared,
        *,
        dimension: Annotated[int, "trained numbers of the whole model", Range(1)] = 1000,
        structure_aware: Annotated[bool, "spend one of them on a factor for each site"] = True,
    ):
        super().__init__(site, shared)
        length = len(shared.theta)
        if length != dimension - site.count * structure_aware:
            raise GraftError(f"said: dimension must be the same at all sites, which share theta; not so at {site.path}")
        self.lam = nn.Parameter(torch.ones(())) if structure_aware else None
        size = site.d_out * site.d_in
        full = _power(size)
        short = _power(min(length, full))  # H of a vector with zeros behind `short` repeats the H of its beginning
        random = {
            "signs": 2.0 * torch.randint(2, (short,)) - 1,
            "index": (torch.randperm(full) % short).int(),
            "gains": torch.randn(full),
        }
        random["gains"] /= torch.linalg.vector_norm(random["gains"]) * math.sqrt(size)
        for name, value in random.items():
            self.register_buffer(name, value, persistent=False)

    def forward(self, inner, x):
        w, b = inner.weight, self.bias(inner.bias)
        return self.site.apply_formed(x, _moved, w, b, *self._given())

    def weight(self, w):
        return _moved(w, *self._given())

    def _given(self) -> tuple[Tensor, ...]:
        theta = self.shared.theta if self.lam is None else self.lam * self.shared.theta
        return theta, self.signs, self.index, self.gains


def _power(size: int) -> int:
    """The next power of two from `size`."""
    return 1 << (size - 1).bit_length()


def _moved(w, theta, signs, index, gains):
    return w + fastfood(theta, signs, index, gains)[: w.numel()].view(w.shape).to(w.dtype)


def fastfood(theta: Tensor, signs: Tensor, index: Tensor, gains: Tensor) -> Tensor:
    """H G Pi H S theta [full], `index` [full] being the rows of Pi H S among those of a short H, as long as `signs`.

    In float32 at least, for sums of so many terms.
    """
    wide = torch.promote_types(theta.dtype, torch.float32)
    theta, signs, gains = theta[: len(signs)].to(wide), signs.to(wide), gains.to(wide)
    h = hadamard(signs * nn.functional.pad(theta, (0, len(signs) - len(theta))))
    return hadamard(gains * h.index_select(0, index))


def hadamard(x: Tensor) -> Tensor:
    """The Walsh-Hadamard transform of x [n], n a power of two, without a factor."""
    n = x.shape[-1]
    one = x.new_ones(1, 1)
    for _ in range(min(n, _BLOCK).bit_length() - 1):
        one = torch.cat([torch.cat([one, one], 1), torch.cat([one, -one], 1)])
    h, left = x, n
    while left > 1:  # one digit after the other, the first of those left, which moves to the end; H is symmetric
        side = min(left, len(one))
        h, left = h.view(side, -1).mT @ one[:side, :side], left // side
    return h.reshape(n)


def intrinsic_dimension(
    score: Callable[[int], float], full: float, dimensions: Iterable[int], *, share: float = 0.9
) -> int | None:
    """The smallest d of `dimensions` with score(d) >= share full, the paper's d90 for share = 0.9; None without one.

    score  trains with d numbers and measures, e.g. lambda d: graft.tune(..., method=graft.SAID(dimension=d), ...) and
           the metric that it reports; called log2 of the number of dimensions times, as scores are taken to rise with d
    full   the same metric of full fine-tuning (graft.Full())
    """
    left = sorted(set(dimensions))
    if not left or not 0 < share <= 1:
        raise GraftError(f"intrinsic_dimension: dimensions {left!r} and share {share!r} must be some, and in (0, 1]")
    found = None
    while left:
        middle = (len(left) - 1) // 2
        if score(left[middle]) >= share * full:
            found, left = left[middle], left[:middle]
        else:
            left = left[middle + 1 :]
    return found
