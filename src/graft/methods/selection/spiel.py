"""SpIEL: Scaling Sparse Fine-Tuning to Large Language Models. Ansell et al., 2024."""

from typing import Annotated

import torch
from torch import Tensor

from ...core import selection
from ...core.delta import Paper
from ...core.errors import GraftError
from ...core.hyper import Range
from ...core.sparse import placed, pulled, strongest
from .entries import Entries


class SpIEL(Entries, name="spiel"):
    """W' = W + S, with S zero but at `density` of the entries of W [out, in], which change places as training goes.

    `value` [k], zero at first, lies at the flat positions `index` [k], at random at the start. Every `interval` steps a
    share p of them is dropped, those with the smallest |value|, and as many are grown elsewhere, with the value zero:
    those of k candidates with the largest |sum of dL/dW| over `watched` steps. The candidates are the k entries with
    the largest |dL/dW| in the first of these. All are replaced the first time (p = 1); later p = rate (1 - progress).

    Memory is that of k values: the gradient of the whole matrix exists in pieces, in one backward of `interval`.
    What is grown begins without a past in the optimizer. This is SpIEL-AG (accumulated gradients).

    From the authors' code (github.com/AlanAnsell/peft, tuners/sft), whose defaults these are. It gives what is grown
    the momenta of its candidate; here they begin at zero, and the first watched step is the second one.
    """

    papers = (
        Paper(
            "Scaling Sparse Fine-Tuning to Large Language Models",
            "Ansell et al.",
            2024,
            "https://arxiv.org/abs/2401.16405",
        ),
    )
    known = (
        "Its authors report that in instruction tuning of LLaMA 2 7B and 13B it is often better than LoRA in "
        "comparable time, and that it works on quantised models."
    )
    hosts = ("linear",)
    small = dict(density=0.2)
    steps: Tensor
    candidates: Tensor
    sums: Tensor

    def __init__(
        self,
        site,
        *,
        density: Annotated[float, "share of the entries which are trained", Range(above=0, high=1)] = 0.01,
        interval: Annotated[int, "steps between changes of place", Range(2)] = 20,
        watched: Annotated[int, "steps over which the gradients of candidates are summed", Range(1)] = 5,
        rate: Annotated[float, "share that is replaced at first", Range(0, high=1)] = 0.2,
    ):
        if watched >= interval:
            raise GraftError(f"spiel: watched must be below interval = {interval}, not {watched}")
        keep = max(1, round(density * site.d_out * site.d_in))
        super().__init__(site, lambda: selection.best(selection.scores("random", site), keep))
        self.interval, self.watched, self.rate = interval, watched, rate
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("watching", torch.zeros((), dtype=torch.bool))
        self.register_buffer("candidates", torch.full_like(self.index, -1))
        self.register_buffer("sums", torch.zeros(len(self.index)))

    def forward(self, inner, x):
        tensors = self.value, self.index, self.watching, self.candidates, self.sums
        return self.site.apply_formed(x, _placed, inner.weight, self.bias(inner.bias), *tensors, pull=_pulled)

    @classmethod
    @torch.no_grad()
    def step(cls, deltas, progress):
        fresh = {}
        for d in deltas:
            d.steps += 1
            if int(d.steps) % d.interval == d.watched + 1:
                share = 1.0 if int(d.steps) < d.interval else d.rate * (1 - progress)
                fresh[d.value] = d.replace(int(share * len(d.value)))
            d.watching.fill_(1 <= int(d.steps) % d.interval <= d.watched)
        return fresh

    @torch.no_grad()
    def replace(self, count: int) -> Tensor:
        """Drop `count` entries and grow others; a mask of those that are new."""
        dropped = torch.zeros_like(self.value, dtype=torch.bool)
        dropped[self.value.abs().topk(count, largest=False).indices] = True
        free = ~torch.isin(self.candidates, self.index[~dropped])
        size = torch.where(free, self.sums.abs(), -1.0)
        grown = self.candidates[size.topk(min(count, int(free.sum()))).indices]
        stays = torch.isin(self.index, grown)  # dropped and grown at once
        incoming = grown[~torch.isin(grown, self.index)]
        weakest = torch.where(dropped & ~stays, self.value.abs(), torch.inf).topk(len(incoming), largest=False).indices
        self.index[weakest] = incoming
        new = torch.zeros_like(dropped)
        new[weakest] = True
        self.value[new] = 0
        if self.value.grad is not None:
            self.value.grad[new] = 0
        self.candidates.fill_(-1)
        self.sums.zero_()
        return new


def _placed(w, value, index, *_):
    return placed(w, value, index)


def _pulled(g, x, w, value, index, watching, candidates, sums):
    """`pulled` for an index that need not rise, which sums the gradients of the candidates while it is watching."""
    if torch.is_grad_enabled():
        return (*pulled(g, x, w, value, index), None, None, None)
    rising, order = index.sort()
    found = torch.ops.graft.watched_product(g, x, rising, watching, candidates, sums).to(value.dtype)
    return found[order.argsort()], None, None, None, None


torch.library.define(
    "graft::watched_product",
    "(Tensor g, Tensor x, Tensor index, Tensor watching, Tensor candidates, Tensor sums) -> Tensor",
)


@torch.library.impl("graft::watched_product", "CompositeExplicitAutograd")
def _watched_product(g: Tensor, x: Tensor, index: Tensor, watching: Tensor, candidates: Tensor, sums: Tensor) -> Tensor:
    """`sampled_product`, which also finds candidates and sums their gradients.

    It writes past the counts of changes: these tensors are notes that no forward or backward reads, only `step`.
    """
    if watching:
        note(g, x, candidates.data, sums.data)
    return torch.ops.graft.sampled_product(g, x, index)


def note(g: Tensor, x: Tensor, candidates: Tensor, sums: Tensor) -> None:
    """Add the gradients of the candidates to their sums, after finding them; g = dL/dy [n, out] and x [n, in]."""
    if (candidates < 0).any():
        candidates.copy_(strongest(g, x, len(candidates)))
    sums += torch.ops.graft.sampled_product(g, x, candidates).to(sums.dtype)


@torch.library.register_fake("graft::watched_product")
def _(g, x, index, *_):
    return x.new_empty(index.shape, dtype=torch.promote_types(x.dtype, torch.float32))
