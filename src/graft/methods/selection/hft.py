"""HFT: Half Fine-Tuning for Large Language Models. Hui et al., 2024."""

import re
from collections import defaultdict

import torch

from ...core.delta import Paper
from ..weight.full import Full


class HFT(Full, name="hft"):
    """W' = V at a random half of the matrices W [out, in] and norms, V trained from W; the other half is left alone.

    The half is balanced by category: of the matrices of an attention, those of an MLP and the norms of each block half
    are drawn; where a category has an odd number (the three matrices of a gated MLP), a random half of the blocks
    trains one more than the others. What stands alone outside of blocks (a final norm, and if among the targets the
    embeddings and the output head) is trained. The frozen half has no gradient, no optimizer state and is not saved.
    The paper draws anew for each stage of training: attach the adapter of each stage with another seed, on the model
    into which the last one was merged.

    The paper's text could not be read beyond its abstract, and no code of its authors was found. The choice is that
    which two others give alike: a summary of the paper, and the reimplementation as a baseline in the code of
    source-shielded updates (SSU). There embeddings and output head are trained, too: add them to the targets for that.
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
    hosts = ("linear", "conv", "embedding", "norm")
    targets = ("all-linear", "norms")
    lycoris = None

    @classmethod
    def plan(cls, sites, hypers):
        families: dict[tuple[str, str], list] = defaultdict(list)
        for site in sites:
            families[_family(site)].append(site)
        odd: dict[str, list] = defaultdict(list)
        larger = {key for key, (first, *rest) in families.items() if not rest and not _BLOCK.match(first.path)}
        for key, family in families.items():
            if len(family) % 2 and key not in larger:
                odd[key[1]].append(key)
        for alike in odd.values():
            larger |= {alike[i] for i in torch.randperm(len(alike))[: (len(alike) + 1) // 2].tolist()}
        kept = {}
        for key, family in families.items():
            count = len(family) // 2 + (key in larger)
            kept |= {family[i].path: hypers[family[i].path] for i in torch.randperm(len(family))[:count].tolist()}
        return kept

    def __init__(self, site):
        super().__init__(site)


_BLOCK = re.compile(r"(.+\.\d+)\.(.+)")  # the path of a block, and what stands in it


def _family(site) -> tuple[str, str]:
    """A block with the category of the site in it; outside of blocks the parent with the kind."""
    found = _BLOCK.match(site.path)
    if not found:
        return site.path.rpartition(".")[0], site.kind
    block, within = found.groups()
    return block, "norm" if site.kind == "norm" else "attention" if "att" in within.lower() else "other"
