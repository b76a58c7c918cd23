"""HFT: Half Fine-Tuning for Large Language Models. Hui et al., 2024."""

from collections import defaultdict

import torch

from ...core.delta import Paper
from ..weight.full import Full


class HFT(Full, name="hft"):
    """W' = V at a random half of the matrices W [out, in] and norms, V trained from W; the other half is left alone.

    The half is balanced by category: of the modules which have one parent (the projections of an attention, the
    matrices of an MLP, the norms of a block) half are drawn; where their number is odd, the larger and the smaller half
    in turn. The frozen half has no gradient, no optimizer state and is not saved. The paper draws anew for each stage
    of training: attach the adapter of each stage with another seed, on the model into which the last one was merged.

    From the paper's abstract and a public summary of its section on the choice (half of the parameters by category in
    each layer). The full text could not be read: how odd categories alternate is chosen here.
    """

    papers = (
        Paper(
            "HFT: Half Fine-Tuning for Large Language Models", "Hui et al.", 2024, "https://arxiv.org/abs/2404.18466"
        ),
    )
    known = (
        "Its authors report less forgetting than by full fine-tuning in instruction tuning, preference optimisation "
        "and continual learning, and about 30 % less training time."
    )
    hosts = ("linear", "conv", "norm")
    targets = ("all-linear", "norms")
    lycoris = None

    @classmethod
    def plan(cls, sites, hypers):
        families = defaultdict(list)
        for site in sites:
            families[site.path.rpartition(".")[0], site.kind == "norm"].append(site)
        kept, larger = set(), True
        for family in families.values():
            odd = len(family) % 2
            count = len(family) // 2 + (odd and larger)
            larger = larger != bool(odd)
            kept |= {family[i].path for i in torch.randperm(len(family))[:count].tolist()}
        return {path: hypers[path] for path in kept}

    def __init__(self, site):
        super().__init__(site)
