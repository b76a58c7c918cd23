"""Updates of single-rank triplets, each with a value: for methods that treat the values, or their number, apart."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.errors import GraftError
from ...core.factored import Factored, unit


class Valued(Factored):
    """W' = W + P diag(v) Q with P [out, rank], Q [rank, in] and the `values` v [rank]."""

    passes_x = True
    by_factors = True
    dropout: float  # probability of dropping an input of the update

    def __init__(self, site, P: Tensor, Q: Tensor):
        super().__init__(site)
        self.P, self.Q = nn.Parameter(P), nn.Parameter(Q)

    def values(self) -> Tensor:
        """v [rank], its scaling included."""
        raise NotImplementedError

    def product(self):
        return self.Q, self.P * self.values()

    def prepare(self, inner):
        return (self.Q, self.P, self.values()) if self.scales_later else self.factors()

    def act(self, inner, x, A, B, values=None):
        z = F.dropout(x, self.dropout, self.training) if self.dropout else x
        h = self.site.down(z, A)
        return self.site.add_up(inner(x), h if values is None else self.site.scale(h, values), B)

    def weight(self, w):
        return self.rest(w) + (self.P * self.values()) @ self.Q


class PseudoSVD(Valued):
    """W' = W + s P diag(e) Q with P [out, rank], e [rank] from zero, Q [rank, in] and s = alpha / rank."""

    def __init__(self, site, P: Tensor, Q: Tensor, alpha: float, dropout: float):
        super().__init__(site, P, Q)
        self.e = nn.Parameter(torch.zeros(len(Q)))
        self.scaling, self.dropout = alpha / len(Q), dropout

    def values(self):
        return self.scaling * self.e

    def take(self, A, B):
        (Q, right), (P, left) = unit(A), unit(B.T)
        self.Q.copy_(torch.where(right[:, None] > 0, Q, self.Q))  # where nothing is given, its own random start stays
        self.P.copy_(torch.where(left > 0, P.T, self.P))
        self.e.copy_(left * right)

    @staticmethod
    def skew(deltas) -> Tensor:
        """The mean of ||P^T P - I||_F and ||Q Q^T - I||_F over all sites."""

        def away(gram):
            return torch.linalg.matrix_norm(gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device))

        return torch.stack([away(g) for d in deltas for g in (d.P.T @ d.P, d.Q @ d.Q.T)]).mean()


class Triplets(PseudoSVD):
    """W' = W + s P diag(e * keep) Q with P [out, rank], e [rank] from zero, Q [rank, in] and s = alpha / rank.

    `keep` [rank] of zeros and ones leaves the most important triplets (P[:, i], e[i], Q[i]) of all sites together, from
    `rank` to `target_rank` a site. Methods say how their number falls (`left`) and what is important.
    """

    keep: Tensor

    @classmethod
    def plan(cls, sites, hypers):
        return hypers  # it shares the ranks out itself

    def __init__(self, site, P, Q, target_rank, alpha, dropout, warmup, cooldown):
        super().__init__(site, P, Q, alpha, dropout)
        rank = len(Q)
        if target_rank > rank:
            raise GraftError(f"{self.name}: target_rank must be at most rank = {rank}, not {target_rank}")
        if warmup + cooldown >= 1:
            raise GraftError(f"{self.name}: warmup + cooldown must be below 1, not {warmup + cooldown:g}")
        self.register_buffer("keep", torch.ones(rank))
        self.target_rank, self.warmup, self.cooldown = target_rank, warmup, cooldown

    def values(self):
        """s e * keep [rank]; the gradient reaches all of e."""
        return self.scaling * (self.e + (self.keep - 1) * self.e.detach())

    def observe(self) -> None:
        """Follow, at each step before the choice is final, what `importance` needs."""
        raise NotImplementedError

    def importance(self) -> Tensor:
        """Of each triplet, [rank]."""
        raise NotImplementedError

    @staticmethod
    def left(phase: float) -> float:
        """The share of the triplets above the target that is left, from 1 to 0 while `phase` goes from 0 to 1."""
        raise NotImplementedError

    @classmethod
    def budget(cls, deltas, progress: float) -> int:
        """The number of triplets kept over all sites."""
        one = deltas[0]
        start, end = sum(len(d.e) for d in deltas), sum(d.target_rank for d in deltas)
        phase = (progress - one.warmup) / (1 - one.warmup - one.cooldown)
        return int(end + (start - end) * cls.left(min(max(phase, 0.0), 1.0)) + 1e-6)  # the cube of a fraction rounds

    @classmethod
    @torch.no_grad()
    def step(cls, deltas, progress):
        if progress < 1 - deltas[0].cooldown:
            for d in deltas:
                d.observe()
        scores = torch.cat([d.importance() for d in deltas])
        keep = torch.zeros_like(scores)
        keep[scores.topk(cls.budget(deltas, progress)).indices] = 1
        for d, kept in zip(deltas, keep.split([len(d.e) for d in deltas])):
            d.keep.copy_(kept)
            d.e.mul_(kept)
