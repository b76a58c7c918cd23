"""ALoRA: Allocating Low-Rank Adaptation for Fine-tuning Large Language Models. Liu et al., 2024."""

from typing import Annotated

import torch
from torch import Tensor, nn

from ...core.delta import Paper
from ...core.errors import GraftError
from ...core.factored import Start
from ...core.hyper import Range
from .triplets import Valued


class ALoRA(Valued, name="alora"):
    """W' = W + s P diag(keep) Q with s = alpha / rank, where the ranks go from site to site while they are trained.

    P [out, limit] starts at zero and Q [limit, in] Kaiming uniform; `keep` [limit] of zeros and ones, not trained, is
    one for the first `rank` of each site at the start. After the share `warmup` of training, `rounds` rounds follow at
    equal distances. In each one every rank i of every site is scored (AB-LoRA) with the mean loss L over `examples`
    training examples which `graft.fit` keeps aside,

        score of i = L(all ranks but i) - L(no rank but i),

    and the lowest are dropped, `moved` for each site of the model. As many new ranks go to the sites that lost none, as
    evenly as can be, more to those of higher mean score first, where there is room below `limit`; they start as those
    at the beginning. If no site was spared or none has room, ranks are lost, as in the paper. A round costs two
    evaluations of the examples for each rank of the model. Only `graft.fit`, or a loop which calls `adapter.review`,
    moves ranks.

    Formulas and the number of ranks, rounds and examples are those of the paper, which warms up for an epoch and tunes
    for a quarter of one after each round: the defaults in a run of three epochs. It has no s, and matrices that grow
    without a limit; no code of it was found.
    """

    papers = (
        Paper(
            "ALoRA: Allocating Low-Rank Adaptation for Fine-tuning Large Language Models",
            "Liu, Lyn, Zhu, Tian, Graham",
            2024,
            "https://arxiv.org/abs/2403.16187",
        ),
    )
    known = "Its authors report better results than other recent methods with about as many trained parameters."
    small = dict(rank=2, limit=3, examples=2)
    keep: Tensor
    done: Tensor
    key: Tensor

    @classmethod
    def plan(cls, sites, hypers):
        return hypers  # it shares the ranks out itself

    def __init__(
        self,
        site,
        *,
        rank: Annotated[int, "rank at the start, and on average", Range(1)] = 8,
        limit: Annotated[int, "largest rank of a site", Range(1)] = 16,
        alpha: Annotated[float, "numerator of the scaling s"] = 16.0,
        dropout: Annotated[float, "probability of dropping an input of the update", Range(0, below=1)] = 0.0,
        warmup: Annotated[float, "share of training before the first round", Range(0, below=1)] = 1 / 3,
        rounds: Annotated[int, "how often ranks move", Range(0)] = 8,
        moved: Annotated[int, "ranks that move in a round, for each site", Range(1)] = 1,
        examples: Annotated[int, "training examples that are kept aside to score ranks", Range(1)] = 32,
        init: Start = "random",
    ):
        if rank > limit:
            raise GraftError(f"alora: limit must be at least rank = {rank}, not {limit}")
        super().__init__(site, torch.zeros(site.d_out, limit), torch.empty(limit, site.d_in))
        nn.init.kaiming_uniform_(self.Q, a=5**0.5)
        self.register_buffer("keep", (torch.arange(limit) < rank).float())
        self.register_buffer("done", torch.tensor(0))  # rounds
        self.register_buffer("key", torch.randint(2**31, ()))  # of the draws for new ranks
        self.scaling, self.dropout = alpha / rank, dropout
        self.warmup, self.rounds, self.moved, self.examples = warmup, rounds, moved, examples
        self.begin(init, rank)

    def values(self):
        return self.scaling * self.keep

    def take(self, A, B):
        self.Q[: len(A)] = A
        self.P[:, : len(A)] = B

    @classmethod
    def aside(cls, deltas, count):
        return deltas[0].examples if deltas[0].rounds else 0

    @classmethod
    @torch.no_grad()
    def review(cls, deltas, progress, trial):
        one = deltas[0]
        passed = (progress - one.warmup) * one.rounds / (1 - one.warmup)
        if int(one.done) >= min(one.rounds, int(passed + 1e-9) + 1) or passed < 0:
            return None
        scores = cls.scores(deltas, trial)
        fresh = cls.move(deltas, scores)
        for d in deltas:
            d.done += 1
        return fresh

    @classmethod
    def scores(cls, deltas, trial) -> list[Tensor]:
        """The score of each rank, [limit] for each site; infinite for those that are not there."""
        before = [d.keep.clone() for d in deltas]
        found = [torch.full_like(k, torch.inf) for k in before]
        try:
            for d, kept, score in zip(deltas, before, found):
                for i in kept.nonzero().flatten().tolist():
                    d.keep[i] = 0
                    without = trial.loss()
                    for other in deltas:
                        other.keep.zero_()
                    d.keep[i] = 1
                    score[i] = without - trial.loss()
                    for other, own in zip(deltas, before):
                        other.keep.copy_(own)
        finally:
            for d, own in zip(deltas, before):
                d.keep.copy_(own)
        return found

    @classmethod
    def move(cls, deltas, scores) -> dict[nn.Parameter, Tensor]:
        """Drop the ranks of the lowest scores, and give as many to the sites that lost none."""
        kept = sum(int(d.keep.sum()) for d in deltas)
        count = min(sum(d.moved for d in deltas), kept)
        lowest = torch.cat([s.cpu() for s in scores]).topk(count, largest=False).indices
        dropped = torch.zeros(sum(map(len, scores)), dtype=torch.bool).index_fill(0, lowest, True)
        spared = []
        for d, score, gone in zip(deltas, scores, dropped.split([len(s) for s in scores])):
            d.keep[gone.to(d.keep.device)] = 0
            if not gone.any() and score.isfinite().any():
                spared.append((score[score.isfinite()].mean().item(), d))
        order = [d for _, d in sorted(spared, key=lambda pair: -pair[0])]
        gains = dict.fromkeys(order, 0)
        while count and (open_ := [d for d in order if int(d.keep.sum()) + gains[d] < len(d.keep)]):
            for d in open_[:count]:
                gains[d] += 1
            count -= len(open_[:count])
        fresh = {}
        for d, gain in gains.items():
            fresh |= d.grow(gain)
        return fresh

    def grow(self, count: int) -> dict[nn.Parameter, Tensor]:
        """`count` new ranks in free places."""
        places = (self.keep == 0).nonzero().flatten()[:count]
        draw = torch.Generator().manual_seed(int(self.key) + int(self.done))
        Q = 2 * torch.rand(count, self.Q.shape[1], generator=draw) - 1
        self.Q[places] = Q.to(self.Q) / self.Q.shape[1] ** 0.5
        self.P[:, places] = 0
        self.keep[places] = 1
        new = torch.zeros_like(self.keep, dtype=torch.bool).index_fill(0, places, True)
        return {self.P: new.expand_as(self.P), self.Q: new[:, None].expand_as(self.Q)}
