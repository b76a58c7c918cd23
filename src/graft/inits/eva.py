"""EVA: One Initialization to Rule them All, Fine-tuning via Explained Variance Adaptation. Paischer et al., 2024."""

from typing import Annotated

import torch

from ..core.delta import Paper
from ..core.factored import Init
from ..core.hyper import Range


class EVA(Init, name="eva"):
    """A [rank, in] = the principal components of the module's inputs, B = 0; the ranks go where the variance is.

    The sum of the ranks of all modules is the budget. The components of all modules are sorted by the share of the
    variance of their module's inputs that each explains, and those within the budget make up the modules' A. A module
    has at most rho times its rank; one that has none of them gets no update at all. alpha follows, so that scalings
    stay. Methods which share out ranks themselves (AdaLoRA) keep theirs.

    Components are centred and come from one pass over the data, where PEFT's `EvaConfig` goes on until directions
    stand still. Source: the paper and PEFT, also for `whiten`: directions over the roots of their singular values.
    """

    papers = (
        Paper(
            "One Initialization to Rule them All: Fine-tuning via Explained Variance Adaptation",
            "Paischer et al.",
            2024,
            "https://arxiv.org/abs/2410.07170",
        ),
    )
    known = (
        "Its authors report faster convergence than other starts and the highest average in each domain: language, "
        "vision and reinforcement learning."
    )
    hosts = ("linear",)

    def __init__(
        self,
        *,
        rho: Annotated[float, "how many times its rank a module may have; 1 leaves all ranks", Range(1)] = 2.0,
        whiten: Annotated[bool, "divide directions by the roots of their singular values"] = False,
    ):
        self.rho, self.whiten = rho, whiten

    def need(self, rank: int) -> str:
        return f"input_components:{round(rank * self.rho)}"

    def asks(self, hyper):
        return (self.need(hyper["rank"]),)

    def factors(self, site, rank, scaling):
        found = site.stats[next(key for key in site.stats if key.startswith("input_components"))]
        self.check_rank(site, rank, len(found.directions))
        A = found.directions[:rank]
        return A / found.sizes[:rank, None].sqrt() if self.whiten else A, torch.zeros(site.d_out, rank)

    def plan(self, sites, hypers):
        if self.rho == 1:
            return hypers
        shares = [site.stats[self.need(hypers[site.path]["rank"])].shares.cpu() for site in sites]
        budget = sum(hyper["rank"] for hyper in hypers.values())
        chosen = torch.cat(shares).argsort(descending=True, stable=True)[:budget]
        owners = torch.cat([torch.full((len(s),), i) for i, s in enumerate(shares)])
        ranks = torch.bincount(owners[chosen], minlength=len(sites)).tolist()
        return {s.path: resized(hypers[s.path], rank) for s, rank in zip(sites, ranks) if rank}


def resized(hyper: dict, rank: int) -> dict:
    """The hyperparameters with another rank and the same scaling."""
    share = (rank / hyper["rank"]) ** (0.5 if hyper.get("rslora") else 1)
    return hyper | {"rank": rank} | ({"alpha": hyper["alpha"] * share} if "alpha" in hyper else {})
