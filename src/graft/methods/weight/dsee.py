"""DSEE: Dually Sparsity-embedded Efficient Tuning of Pre-trained Language Models. Chen et al., 2021."""

from typing import Annotated

import torch
from torch import Tensor, nn

from ...core import selection
from ...core.delta import Delta, Paper
from ...core.errors import GraftError
from ...core.factored import wide
from ...core.host import Link
from ...core.hyper import Range
from ...core.sparse import placed, pulled
from ..selection.entries import Entries
from .lora import LoRA

_GROWTH, _NOISE = 5, 0.01  # of the decomposition, from the authors' code


class DSEE(Delta, name="dsee"):
    """W' = W + s (B A + S), s = alpha / rank: a LoRA, `low`, with A [rank, in] and B [out, rank], and `sparse`, an
    S [out, in] of which `entries` are trained, from zero. A starts normal with deviation 0.02, B at zero.

    The entries are those of the largest |W - U V|, where U V [out, in] is a low-rank part of W found by a greedy
    bilateral decomposition (GreBsmo): U [out, k] and V [k, in] are improved in turns, twice a round, while entries of
    the rest above 0.01 are taken off W; each round but the last adds 5 to k, which begins at 1 and stays below in and
    out. The decomposition begins at random, and is made once.

    Formulas and defaults are those of the authors' code (github.com/VITA-Group/DSEE, run_glue.py and its scripts, on
    queries and values of BERT), which counts the entries of each matrix. What it does after this, to prune weights,
    heads or neurons of the base and tune again, is not done here: W stays whole.
    """

    papers = (
        Paper(
            "DSEE: Dually Sparsity-embedded Efficient Tuning of Pre-trained Language Models",
            "Chen et al.",
            2021,
            "https://arxiv.org/abs/2111.00160",
        ),
    )
    known = (
        "Its authors report comparable results with 0.5 % trained parameters on BERT. The quarter of the operations in "
        "inference which they save comes from pruning the base, which is not done here."
    )
    small = dict(rank=2, entries=5, rounds=2)

    def __init__(
        self,
        site,
        *,
        rank: Annotated[int, "rank of the low-rank part", Range(1)] = 16,
        alpha: Annotated[float, "numerator of the scaling s"] = 32.0,
        dropout: Annotated[float, "probability of dropping an input of the low-rank part", Range(0, below=1)] = 0.0,
        entries: Annotated[int, "entries of each W which are trained", Range(1)] = 16,
        rounds: Annotated[int, "rounds of the decomposition that chooses them", Range(1)] = 100,
    ):
        super().__init__(site)
        if entries > site.d_out * site.d_in:
            raise GraftError(
                f"dsee: entries must be at most the {site.d_out * site.d_in} of {site.path}, not {entries}"
            )
        self.low = LoRA(site, rank=rank, alpha=alpha, dropout=dropout)
        nn.init.normal_(self.low.A, std=0.02)
        self.sparse = _Scaled(
            site.within("sparse"), lambda: selection.best(left(site.weight, rounds).abs(), entries), alpha / rank
        )

    def forward(self, inner, x):
        return self.low(Link(inner, self.sparse), x)

    def weight(self, w):
        return self.low.weight(self.sparse.weight(w))


class _Scaled(Entries):
    """W + s S."""

    def __init__(self, site, pick, scaling):
        super().__init__(site, pick)
        self.scaling = scaling

    def forward(self, inner, x):
        w, b = inner.weight, self.bias(inner.bias)
        return self.site.apply_formed(x, placed, w, b, self.scaling * self.value, self.index, pull=pulled)

    def weight(self, w):
        return placed(w.to(torch.promote_types(w.dtype, self.value.dtype)), self.scaling * self.value, self.index)


def left(w: Tensor, rounds: int) -> Tensor:
    """What a low-rank part leaves of w [out, in]: w - U V."""
    w = wide(w)
    V = torch.randn(1, w.shape[1]).to(w)
    rest = w
    for n in range(rounds):
        clean = w
        for _ in range(2):
            U = torch.linalg.qr(clean @ V.T).Q
            V = U.T @ clean
            rest = w - U @ V
            noise = torch.where(rest.abs() < _NOISE, rest, 0)
            clean = U @ V + noise  # w without the entries of the rest that stand out
        if n == rounds - 1 or len(V) + _GROWTH >= min(w.shape):
            break
        V = torch.cat([V, torch.linalg.qr(noise[:, :_GROWTH]).Q.T @ noise])  # the first rows of R, where noise = Q R
    return rest
