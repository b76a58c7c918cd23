"""TLoRA: Transformed Low-rank Adaptation via Tensor Decomposition and Its Applications to Text-to-image Models.
Tao et al., 2025."""

import math
from typing import Annotated

import torch
from torch import nn

from ...core.delta import Delta, Paper
from ...core.hyper import Range


class TLoRA(Delta, name="tlora"):
    """W' = W T + S: a dense transform T [in, in] (a tensor-ring matrix) and a compact residual S [out, in] (a ring).

        T[i, j] = tr(A_1[i_1, j_1] ... A_D[i_D, j_D])           A_d [I_d, I_d, rank, rank], in = I_1 ... I_D
        S[o, j] = tr(B_1[o_1] ... B_D[o_D] C_1[j_1] ... C_D[j_D])   B_d [O_d, residual, residual], C_d [I_d, ...]

    with D = `cores` and the digits i_1 ... i_D of an index i in the mixed base I_1, ..., I_D, which are as near to each
    other as the size allows. Computed as f(T x) + B (A x), S = B A with residual^2 columns in B: no matrix [in, in] is
    formed, and T x costs rank^2 (I + J) operations per input, I J = in the sizes of both halves of the cores.
    A_d[:, :, r, s] = I / rank makes T the identity at first, B_1 = 0 makes S zero; the others are Gaussian of deviation
    sqrt(residual) / (I_d residual).
    gamma sum ||A_d[:, :, r, s] - I / rank||_F over all d, r, s is added to the loss.

    T alone (residual = 0) is a transform of the inputs like OFT's, but not orthogonal; a method called TLoRA for its
    three matrices is another one. The formulas are those of the authors' code, of which a copy was read
    (github.com/marcocst/PEFTDiff), and of the paper's section 3 as a reproduction restates it. The deviations of the
    cores and gamma are the paper's; the code has other deviations, no penalty, alpha / sqrt(residual) before S, a rank
    of 1 by default, where T is a Kronecker product, and as S a LoRA or a ring matrix at choice. The paper itself could
    not be read: the ranks and the number of cores are choices.
    """

    papers = (
        Paper(
            "Transformed Low-rank Adaptation via Tensor Decomposition and Its Applications to Text-to-image Models",
            "Tao et al.",
            2025,
            "https://arxiv.org/abs/2501.08727",
        ),
    )
    known = (
        "Its authors report better quality for the number of parameters than LoRA's in subject-driven and controllable "
        "image generation with Stable Diffusion."
    )
    hosts = ("linear",)

    def __init__(
        self,
        site,
        *,
        rank: Annotated[int, "ring rank of the transform", Range(1)] = 2,
        residual: Annotated[int, "ring rank of the residual; 0: none", Range(0)] = 2,
        cores: Annotated[int, "cores D of each ring", Range(2)] = 2,
        gamma: Annotated[float, "weight of the penalty which holds the transform near the identity", Range(0)] = 0.0,
    ):
        super().__init__(site)
        ins, outs = digits(site.d_in, cores), digits(site.d_out, cores)
        eyes = [torch.eye(n)[:, :, None, None].expand(n, n, rank, rank) / rank for n in ins]
        self.A = nn.ParameterList(nn.Parameter(e.contiguous()) for e in eyes)
        self.B = nn.ParameterList(_core(n, residual) for n in outs if residual)
        self.C = nn.ParameterList(_core(n, residual) for n in ins if residual)
        if residual:
            nn.init.zeros_(self.B[0])
        self.gamma = gamma

    def residual(self):
        """A [residual^2, in] and B [out, residual^2] with S = B A, or nothing."""
        if not len(self.B):
            return ()
        B, C = _chained(self.B), _chained(self.C)
        return C.mT.flatten(1).T, B.flatten(1)

    def prepare(self, inner):
        return *self.residual(), *self.A

    def act(self, inner, x, *prepared):
        count = 2 if len(self.B) else 0
        thin, cores = prepared[:count], prepared[count:]
        y = inner(_ring(x, [c.to(x.dtype) for c in cores]))
        return self.site.add_up(y, self.site.down(x, thin[0]), thin[1]) if thin else y

    def weight(self, w):
        new = _ring(w.to(torch.promote_types(w.dtype, self.A[0].dtype)), [c.transpose(0, 1) for c in self.A])
        thin = self.residual()
        return new + thin[1] @ thin[0] if thin else new

    @classmethod
    def penalty(cls, deltas):
        terms = []
        for d in deltas:
            for core in d.A if d.gamma else ():
                eye = torch.eye(len(core), dtype=core.dtype, device=core.device) / core.shape[-1]
                away = torch.linalg.vector_norm(core - eye[:, :, None, None], dim=(0, 1)).sum()
                terms.append(d.gamma * away)
        return torch.stack(terms).sum() if terms else None


def digits(size: int, count: int) -> list[int]:
    """`count` factors of size, which handing out its prime factors, the largest first, makes near to each other."""
    primes, p = [], 2
    while size > 1:
        while size % p == 0:
            primes.append(p)
            size //= p
        p = p + 1 if p * p <= size else max(size, 2)
    found = [1] * count
    for p in reversed(primes):
        found[found.index(min(found))] *= p
    return sorted(found)


def _core(size, rank):
    return nn.Parameter(nn.init.normal_(torch.empty(size, rank, rank), std=math.sqrt(rank) / (size * rank)))


def _chained(cores):
    """The products of matrices [I_1 ... I_D, rank, rank]."""
    first, *rest = cores
    for core in rest:
        first = torch.einsum("nab,mbc->nmac", first, core).flatten(0, 1)
    return first


def _ring(x, cores):
    """T x over the last axis of x: T = sum over a, b of left[:, :, a, b] ⊗ right[:, :, b, a], halves of the ring."""
    left, right = _merged(cores[: len(cores) // 2]), _merged(cores[len(cores) // 2 :])
    n, m = len(left), len(right)
    h = x.reshape(-1, m) @ right.permute(1, 3, 2, 0).reshape(m, -1)
    h = h.view(-1, n * left[0, 0].numel(), m)
    return torch.bmm(left.reshape(n, -1).expand(len(h), -1, -1), h).view(x.shape)


def _merged(cores):
    """Neighbouring cores [I, I, rank, rank] as one."""
    first, *rest = cores
    for core in rest:
        first = torch.einsum("ijab,klbc->ikjlac", first, core).flatten(2, 3).flatten(0, 1)
    return first
