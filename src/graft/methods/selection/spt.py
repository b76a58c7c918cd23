"""SPT: Sensitivity-Aware Visual Parameter-Efficient Fine-Tuning. He et al., 2023."""

from typing import Annotated

import torch
from torch import nn

from ...core import selection
from ...core.delta import Paper
from ...core.errors import GraftError
from ...core.hyper import Range
from .entries import Entries


class SPT(Entries, name="spt"):
    """W' = W + S where few entries of W [out, in] are sensitive, and W' = W + B A where many are.

    The sensitivity of an entry is (dL/dw)^2, what the loss falls by, to first order, if that entry alone takes a step
    of gradient descent, as the mean over the batches given to `graft.collect`. Of the entries of all matrices the tau
    most sensitive are marked. A matrix with at least rank (out + in) / ease of them gets factors A [rank, in] and
    B [out, rank], B from zero; any other trains its marked entries, `value` [k] from zero at the flat positions `index`
    [k], and is left alone if it has none. tau is the largest for which all of this stays within the budget, `density`
    times the entries of all matrices.

    From the authors' code (github.com/ziplab/SPT, engine.py and train_spt.py, with its rank and alpha = 10 for `ease`),
    which takes the tau nearest to the budget, treats biases and norms by the same rule, and offers adapters for LoRA.
    """

    papers = (
        Paper(
            "Sensitivity-Aware Visual Parameter-Efficient Fine-Tuning",
            "He et al.",
            2023,
            "https://arxiv.org/abs/2303.08566",
        ),
    )
    known = (
        "Its authors report 4.2 and 1.4 % higher accuracy than the bottleneck adapter on FGVC and VTAB-1k with a "
        "supervised ViT-B/16."
    )
    hosts = ("linear", "conv")
    needs = ("weight_square",)
    small = dict(density=0.3, rank=2)

    @classmethod
    def plan(cls, sites, hypers):
        found = [selection.scores("fisher", site).flatten().cpu() for site in sites]
        budget = round(sum(hypers[s.path]["density"] * one.numel() for s, one in zip(sites, found)))
        costs = [hypers[s.path]["rank"] * (s.d_out + s.d_in) for s in sites]
        from_ = [cost / hypers[s.path]["ease"] for s, cost in zip(sites, costs)]
        order = torch.cat(found).argsort(descending=True, stable=True)
        of = torch.repeat_interleave(torch.arange(len(sites)), torch.tensor([one.numel() for one in found]))[order]

        def spent(tau: int) -> int:
            counts = of[:tau].bincount(minlength=len(sites)).tolist()
            return sum(cost if n and n >= least else n for n, cost, least in zip(counts, costs, from_))

        low, high = 0, len(order)
        while low < high:  # what is spent never falls as tau rises
            middle = (low + high + 1) // 2
            low, high = (middle, high) if spent(middle) <= budget else (low, middle - 1)
        if not low:
            raise GraftError(
                f"spt: density gives {budget} parameters to {len(sites)} matrices, too few for one: raise it"
            )
        plan = selection.give(sites, selection.best_of_all(found, low), hypers)
        for site, least in zip(sites, from_):
            site.stats["factors"] = len(site.stats["entries"]) >= least
        return plan

    def __init__(
        self,
        site,
        *,
        density: Annotated[
            float, "trained parameters over the entries of all matrices", Range(above=0, high=1)
        ] = 0.005,
        rank: Annotated[int, "of the factors", Range(1)] = 8,
        ease: Annotated[float, "how much sooner a matrix gets factors than they cost", Range(1)] = 10.0,
    ):
        many = "A" in site.saved if site.saved is not None else site.stats["factors"]
        super().__init__(site, (lambda: torch.zeros(0, dtype=torch.long)) if many else None)
        self.passes_x = many
        self.A, self.B = None, None
        if many:
            del self.value, self.index
            self.A = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(rank, site.d_in), a=5**0.5))
            self.B = nn.Parameter(torch.zeros(site.d_out, rank))

    def forward(self, inner, x):
        if self.A is None:
            return super().forward(inner, x)
        return self.site.add_up(inner(x), self.site.down(x, self.A), self.B)

    def weight(self, w):
        A, B = self.A, self.B
        return super().weight(w) if A is None or B is None else w + B @ A

    def entries(self):
        return super().entries() if self.A is None else None
