"""TeRA: Vector-based Random Tensor Network for High-Rank Adaptation of Large Language Models. Gu et al., 2025."""

from typing import Annotated

import torch
from torch import nn

from ...core.delta import Delta, Paper
from ...core.errors import GraftError
from ...core.hyper import Range
from .lokr import factorize


class TeRA(Delta, name="tera"):
    """W' = W + (A1 D1 ⊗ A2 D2) G (B1 E1 ⊗ B2 E2)^T / sqrt(in): a Tucker tensor whose scaling vectors are trained.

    The change of W, as a tensor [m1, m2, n1, n2] with out = m1 m2 and in = n1 n2 (the pairs nearest to squares), has
    the core G [rank, rank, rank, rank], above a matrix [rank^2, rank^2], and the factors A1 [m1, rank], A2 [m2, rank],
    B1 [n1, rank], B2 [n2, rank]. They are random and frozen; all sites share G and take the leading rows of shared
    factors. D1, D2, E1, E2 are diagonal: 4 rank parameters a site, for a change of rank min(m1, rank) min(m2, rank) or
    min(n1, rank) min(n2, rank), whichever is less. D1 starts at zero, so that the adapted model starts as the base, the
    others at one. No random tensor is saved: they are drawn again from the adapter's seed. On activations neither the
    change nor a Kronecker product is formed. Many tokens meet a W' that is made from the core, twice, where the core
    has more than half as many entries as W: a product with it takes longer than dL/dW'.

    The paper's text and code could not be read. A Tucker-like network with frozen random factors shared by all layers
    and a trained diagonal beside each is what its abstract tells; the order of the tensor, the starts and distributions
    (normal, of deviation 1 for B1 and B2, rank^-1/2 for A1 and A2, 1 / rank for G, which keep the variance of features)
    and the default are choices made here.
    """

    papers = (
        Paper(
            "TeRA: Vector-based Random Tensor Network for High-Rank Adaptation of Large Language Models",
            "Gu, Zhou, Iacovides, Mandic",
            2025,
            "https://arxiv.org/abs/2509.03234",
        ),
    )
    known = (
        "Its authors report results equal to or better than those of other methods of high rank, with as few "
        "parameters as methods that train vectors."
    )
    hosts = ("linear",)
    passes_x = True
    small = dict(rank=3)

    @classmethod
    def share(cls, sites, *, rank, **_):
        shared = nn.Module()
        outs, ins = zip(*((factorize(s.d_out), factorize(s.d_in)) for s in sites))
        for name, sizes, deviation in (("A", outs, rank**-0.5), ("B", ins, 1.0)):
            for number, size in enumerate(map(max, zip(*sizes)), 1):
                shared.register_buffer(f"{name}{number}", deviation * torch.randn(size, rank), persistent=False)
        shared.register_buffer("G", torch.randn(rank**2, rank**2) / rank, persistent=False)
        return shared

    def __init__(
        self,
        site,
        shared,
        *,
        rank: Annotated[int, "size of the core along each of its four modes", Range(1)] = 32,
    ):
        super().__init__(site, shared)
        if rank**2 != len(shared.G):
            raise GraftError(f"tera: rank must be the same at all sites, which share G; {site.path} asks for {rank}")
        self.sizes = factorize(site.d_out), factorize(site.d_in)
        self.D1 = nn.Parameter(torch.zeros(rank))
        for name in ("D2", "E1", "E2"):
            self.register_parameter(name, nn.Parameter(torch.ones(rank)))

    def prepare(self, inner):
        (m1, m2), (n1, n2) = self.sizes
        s = self.shared
        down = (s.B1[:n1] * (self.E1 / self.site.d_in**0.5)).T, (s.B2[:n2] * self.E2).T
        return *down, s.G, s.A1[:m1] * self.D1, s.A2[:m2] * self.D2

    def forward(self, inner, x):
        site, s = self.site, self.shared
        if not self.joins(inner, x) or 2 * s.G.numel() <= site.d_in * site.d_out:
            return super().forward(inner, x)
        (m1, m2), (n1, n2) = self.sizes
        given = s.G, s.A1[:m1], s.A2[:m2], s.B1[:n1], s.B2[:n2], self.D1, self.D2, self.E1 / site.d_in**0.5, self.E2
        return site.apply_formed(x, _changed, inner.weight, inner.bias, *given, pull=_pulled)

    def act(self, inner, x, left, right, G, up_left, up_right):
        h = self.site.up(self.site.kron(x, left, (right,)), G)
        return inner(x) + self.site.kron(h, up_left, (up_right,))

    def weight(self, w):
        left, right, G, up_left, up_right = self.prepare(None)
        return w + torch.kron(up_left, up_right) @ G @ torch.kron(left.T, right.T).T  # it fails for a transposed column


def _between(M, A1, A2, B1, B2):
    """(A1 ⊗ A2) M (B1 ⊗ B2)^T, the side first that leaves less to do for the other."""
    sides = [(A1, A2, _on_rows), (B1, B2, _on_columns)]
    for left, right, on in sorted(sides, key=lambda side: side[0].shape[0] * side[1].shape[0]):
        M = on(M, left, right)
    return M


def _on_rows(M, P, Q):
    """(P ⊗ Q) M."""
    h = (P @ M.reshape(P.shape[1], -1)).view(len(P), Q.shape[1], -1)
    return torch.bmm(Q.expand(len(P), -1, -1), h).flatten(0, 1)


def _on_columns(M, P, Q):
    """M (P ⊗ Q)^T."""
    h = (M.reshape(-1, Q.shape[1]) @ Q.T).view(len(M), P.shape[1], -1)
    return torch.bmm(P.expand(len(M), -1, -1), h).flatten(1)


def _changed(w, G, A1, A2, B1, B2, D1, D2, E1, E2):
    return w + _between(G, A1 * D1, A2 * D2, B1 * E1, B2 * E2)


def _pulled(g, x, w, G, A1, A2, B1, B2, D1, D2, E1, E2):
    """The gradients of the vectors from those of the scaled core, (A1 ⊗ A2)^T dL/dW' (B1 ⊗ B2)."""
    H = G * _between(g.mT @ x, A1.T, A2.T, B1.T, B2.T)
    rows = (H @ torch.outer(E1, E2).flatten()).view(len(D1), -1)
    columns = (torch.outer(D1, D2).flatten() @ H).view(len(E1), -1)
    return None, None, None, None, None, rows @ D2, D1 @ rows, columns @ E2, E1 @ columns
