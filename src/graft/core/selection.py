"""Which entries of matrices are trained: a score for every entry, and the best of all, of each row, or of each block.

A score comes from the weights, from gradients or activations (statistics of `graft.collect`), or from chance; they are
in SCORES.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .drawn import subset
from .errors import GraftError


class Score(NamedTuple):
    formula: str
    of: Callable[..., Tensor]  # site -> [out, in], or what broadcasts to it
    needs: tuple[str, ...] = ()  # statistics


def _norms(site) -> Tensor:
    """Of the inputs of each column, [in]."""
    return site.stats["input_square"].sqrt()


def _weight(site) -> Tensor:
    return site.weight.detach()


SCORES: dict[str, Score] = {
    "random": Score("uniform in [0, 1)", lambda site: torch.rand(site.d_out, site.d_in)),
    "magnitude": Score("|W|", lambda site: _weight(site).abs()),
    "gradient": Score(
        "|dL/dW|, of the mean over batches", lambda site: site.stats["weight_grad"].abs(), ("weight_grad",)
    ),
    "snip": Score(
        "|W dL/dW|, of the mean over batches",
        lambda site: (_weight(site) * site.stats["weight_grad"]).abs(),
        ("weight_grad",),
    ),
    "fisher": Score("mean over batches of (dL/dW)^2", lambda site: site.stats["weight_square"], ("weight_square",)),
    "activation": Score("norm of the inputs of each column", lambda site: _norms(site), ("input_square",)),
    "wanda": Score(
        "|W| times the norm of the inputs of its column",
        lambda site: _weight(site).abs() * _norms(site).to(_weight(site)),
        ("input_square",),
    ),
    "change": Score(
        "|W_tuned - W| after full fine-tuning", lambda site: site.stats["weight_change"].abs(), ("weight_change",)
    ),
}


def needs(score: str) -> tuple[str, ...]:
    """The statistics from which a score is made."""
    return SCORES[score].needs


def scores(score: str, site) -> Tensor:
    """[out, in], in float32 at least."""
    found = SCORES[score].of(site)
    wide = torch.promote_types(found.dtype, torch.float32)
    return found.to(site.where().device, wide).expand(site.d_out, site.d_in)


def best(score: Tensor, keep: int) -> Tensor:
    """The flat positions of the `keep` highest, rising."""
    return score.flatten().topk(keep).indices.sort().values


def best_in_rows(score: Tensor, keep: int) -> Tensor:
    """The flat positions of the `keep` highest of each row, rising."""
    columns = score.topk(keep, 1).indices.sort(1).values
    return (torch.arange(len(score), device=score.device)[:, None] * score.shape[1] + columns).flatten()


def best_of_all(scores: list[Tensor], keep: int) -> list[Tensor]:
    """The flat positions in each tensor of the `keep` highest of all tensors together, rising."""
    chosen = torch.cat([s.flatten().cpu() for s in scores]).topk(keep).indices
    return _divided(chosen.sort().values, [s.numel() for s in scores])


def allot(sites: list, score: Callable[..., Tensor], hypers: dict[str, dict]) -> dict[str, dict]:
    """The plan (`Delta.plan`) of the sites that have some of the best entries, or groups of them, of all.

    `score` gives a tensor for a site. How many are kept is what the `density` of each site comes to over all.
    """
    found = [score(s) for s in sites]
    keep = max(1, round(sum(hypers[s.path]["density"] * one.numel() for s, one in zip(sites, found))))
    return give(sites, best_of_all(found, keep), hypers)


def allotted(site) -> Tensor:
    """What `allot` gave a site; for a delta that comes from a file, as many positions as are in it."""
    if site.saved is None:
        return site.stats["entries"]
    return torch.zeros(len(site.saved.get("index", ())), dtype=torch.long)


def share_at_random(sites: list, keep: int, hypers: dict[str, dict]) -> dict[str, dict]:
    """The plan of the sites that get some of `keep` entries of all, drawn at random: how many, `stats["count"]`."""
    sizes = [s.d_out * s.d_in for s in sites]
    if keep > sum(sizes):
        raise GraftError(f"{keep:,} entries cannot be chosen of the {sum(sizes):,} that the targets have")
    parts = _divided(subset(keep, sum(sizes), torch.initial_seed(), 0), sizes)
    for site, part in zip(sites, parts):
        site.stats = site.stats | {"count": len(part)}
    return {site.path: hypers[site.path] for site, part in zip(sites, parts) if len(part)}


def give(sites: list, entries: list[Tensor], hypers: dict[str, dict]) -> dict[str, dict]:
    """Put the flat positions of each site into its `stats["entries"]`; the plan of those that have some."""
    for site, found in zip(sites, entries):
        site.stats = site.stats | {"entries": found.to(site.where().device)}
    return {site.path: hypers[site.path] for site, found in zip(sites, entries) if len(found)}


def _divided(rising: Tensor, sizes: list[int]) -> list[Tensor]:
    """Positions in tensors laid end to end, as positions in each."""
    ends = torch.tensor(sizes).cumsum(0)
    parts = rising.tensor_split(torch.searchsorted(rising, ends[:-1]).tolist() if len(sizes) > 1 else [])
    return [part - (end - size) for part, end, size in zip(parts, ends, sizes)]
