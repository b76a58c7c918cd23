"""Lean and Mean Adaptive Optimization via Subset-Norm and Subspace-Momentum with Convergence Guarantees. Nguyen,
Nguyen, 2024. https://arxiv.org/abs/2411.07120
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class SNSM(torch.optim.Optimizer):
    """Adam with one step size for a subset of a matrix (SN) and with momentum in a subspace only (SM).

        v_S <- beta2 v_S + (1 - beta2) ||g_S||^2         for each subset S of the entries of the gradient g
        m   <- beta1 m + (1 - beta1) P g                 P [rank, d] projects on a subspace
        w_S <- w_S - lr c (P^T m + g - P^T P g)_S / (sqrt(v_S) + eps),    c = sqrt(1 - beta2^t) / (1 - beta1^t)

    Outside the subspace the step is that of SGD. Weight decay is decoupled: w <- w - lr weight_decay w.

    subset  entries that share v: "side", those along the shorter side of a matrix [n, m], so that v has max(n, m)
            entries (the paper's heuristic); a number, so many neighbours, or the next smaller divisor of n m
    rank    of P, the largest singular vectors of g along the longer side's rows or columns, so that m is [max(n, m),
            rank]; None for momentum everywhere, as Adam has it
    gap     steps between two choices of P, after which m begins at zero

    What has no two dimensions is Adam's. The state of a matrix is max(n, m) (1 + rank) + min(n, m) rank numbers, where
    Adam keeps 2 n m. v_S is a sum over S: rates are about ten times Adam's. Source: the paper and the authors' code
    (timmytonga/sn-sm).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        subset: str | int = "side",
        rank: int | None = None,
        gap: int = 200,
    ):
        if not (subset == "side" or (type(subset) is int and subset > 0)):
            raise ValueError(f"subset is 'side' or a number above 0, not {subset!r}")
        if rank is not None and rank < 1:
            raise ValueError(f"rank is a number above 0 or None, not {rank!r}")
        if gap < 1:
            raise ValueError(f"gap is a number above 0, not {gap!r}")
        options = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, subset=subset, rank=rank, gap=gap)
        super().__init__(params, options)

    @torch.no_grad()
    def step(self, closure=None):  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._move(p, p.grad, self.state[p], group)
        return loss

    def _move(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        (beta1, beta2), t = group["betas"], state.get("step", 0) + 1
        state["step"] = t
        subsets = _subsets(g, group["subset"])
        square = subsets.square().sum(1, keepdim=True)
        v = state.setdefault("v", torch.zeros_like(square)).mul_(beta2).add_(square, alpha=1 - beta2)
        direction = self._momentum(g, state, group, beta1, t)
        move = _subsets(direction, group["subset"]) / v.sqrt().add_(group["eps"])
        move = move.T if _turned(g, group["subset"]) else move
        p.add_(move.reshape(p.shape), alpha=-group["lr"] * math.sqrt(1 - beta2**t) / (1 - beta1**t))
        p.mul_(1 - group["lr"] * group["weight_decay"])

    def _momentum(self, g: Tensor, state: dict[str, Any], group: dict[str, Any], beta1: float, t: int) -> Tensor:
        rank = group["rank"]
        if rank is None or g.dim() != 2 or rank >= min(g.shape):
            return state.setdefault("m", torch.zeros_like(g)).mul_(beta1).add_(g, alpha=1 - beta1)
        tall = g if len(g) >= g.shape[1] else g.T  # [longer, shorter]
        if "P" not in state or t % group["gap"] == 0:
            P = torch.linalg.svd(tall.float(), full_matrices=False).Vh[:rank].to(g.dtype)
            state |= {"P": P, "m": tall.new_zeros(len(tall), rank)}
        m, P = state["m"], state["P"]
        part = tall @ P.T
        m.mul_(beta1).add_(part, alpha=1 - beta1)
        direction = tall + (m - part) @ P
        return direction if tall is g else direction.T


def _turned(g: Tensor, subset: str | int) -> bool:
    """Whether subsets are columns."""
    return subset == "side" and g.dim() == 2 and len(g) < g.shape[1]


def _subsets(g: Tensor, subset: str | int) -> Tensor:
    """g as [subsets, entries]."""
    if g.dim() != 2:
        return g.reshape(-1, 1)
    if subset == "side":
        return g.T if _turned(g, subset) else g
    size = next(n for n in range(min(int(subset), g.numel()), 0, -1) if g.numel() % n == 0)
    return g.reshape(-1, size)
