"""BiLoRA: A Bi-level Optimization Framework for Overfitting-Resilient Low-Rank Adaptation of Large Pre-trained Models.
Qiang et al., 2024."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated

import torch
from torch import Tensor

from ...core.delta import Paper
from ...core.factored import Start
from ...core.hyper import Range
from .triplets import PseudoSVD

_RADIUS = 0.01  # of the finite difference, as in DARTS


class BiLoRA(PseudoSVD, name="bilora"):
    """W' = W + s P diag(e) Q with s = alpha / rank, whose vectors and values learn from different data.

    P [out, rank] and Q [rank, in] are random (normal, deviation 0.02) and e [rank] zero, so that the adapted model
    starts as the base. `graft.fit` keeps the `share` D2 of the training examples aside and trains P and Q, and heads,
    on the rest D1, with a penalty of gamma times the mean of ||P^T P - I||_F and ||Q Q^T - I||_F over all sites. The
    values e descend on D2, seen from where the vectors V = (P, Q) would be after a step on D1: with r the learning rate
    and V' = V - r dL1/dV,

        gradient of e = dL2/de (V') - r d2L1/de dV (V) . dL2/dV (V'),

    the second derivative as a difference of dL1/de at V + h dL2/dV (V') and V - h dL2/dV (V'), |h dL2/dV| = 0.01. A
    step of training costs four passes in place of one. A loop that does not call `adapter.review` trains all alike.

    Only the abstract and a review of the paper could be read, and no code of it was found: the two levels are the
    paper's, start, scaling and penalty AdaLoRA's; `share` and the kind of hypergradient are those of BiDoRA of the same
    group (github.com/t2ance/BiDoRA), whose library Betty leaves out the factor r.
    """

    papers = (
        Paper(
            "BiLoRA: A Bi-level Optimization Framework for Overfitting-Resilient Low-Rank Adaptation of Large "
            "Pre-trained Models",
            "Qiang, Zhang, Xie",
            2024,
            "https://arxiv.org/abs/2403.13037",
        ),
        Paper(
            "DARTS: Differentiable Architecture Search", "Liu, Simonyan, Yang", 2018, "https://arxiv.org/abs/1806.09055"
        ),
    )
    known = (
        "Its authors report less overfitting and better results than LoRA with about as many parameters, on ten data "
        "sets of language understanding and generation."
    )
    small = dict(rank=3)

    def __init__(
        self,
        site,
        *,
        rank: Annotated[int, "number of pseudo singular values", Range(1)] = 8,
        alpha: Annotated[float, "numerator of the scaling s"] = 16.0,
        dropout: Annotated[float, "probability of dropping an input of the update", Range(0, below=1)] = 0.0,
        share: Annotated[float, "share of the training examples for the values", Range(above=0, below=1)] = 0.2,
        gamma: Annotated[float, "weight of the orthogonality penalty", Range(0)] = 0.1,
        init: Start = "random",
    ):
        P, Q = 0.02 * torch.randn(site.d_out, rank), 0.02 * torch.randn(rank, site.d_in)
        super().__init__(site, P, Q, alpha, dropout)
        self.fraction, self.gamma = share, gamma
        self.begin(init, rank)

    @classmethod
    def penalty(cls, deltas):
        return deltas[0].gamma * cls.skew(deltas)

    @classmethod
    def aside(cls, deltas, count):
        return max(1, round(deltas[0].fraction * count))

    @classmethod
    def review(cls, deltas, progress, trial):
        values, vectors = [d.e for d in deltas], [m for d in deltas for m in (d.P, d.Q)]
        rate = trial.learning_rate
        with moved(vectors, [torch.zeros_like(v) if v.grad is None else v.grad for v in vectors], -rate):
            found = trial.gradients([*values, *vectors], aside=True)
        direct, ways = found[: len(values)], found[len(values) :]
        size = torch.stack([w.norm() for w in ways]).norm().item()
        if size > 0:
            sides = []
            for h in (_RADIUS / size, -_RADIUS / size):
                with moved(vectors, ways, h):
                    sides.append(trial.gradients(values))
            bends = [(a - b) * (size / (2 * _RADIUS)) for a, b in zip(*sides)]
            direct = [g - rate * bend for g, bend in zip(direct, bends)]
        for e, g in zip(values, direct):
            e.grad = g


@contextmanager
def moved(tensors: Sequence[Tensor], ways: Sequence[Tensor], by: float) -> Iterator[None]:
    """The tensors moved along `ways`, for the duration of the context; then they are back, bit for bit."""
    before = [t.detach().clone() for t in tensors]
    try:
        with torch.no_grad():
            for t, way in zip(tensors, ways):
                t.add_(way, alpha=by)
        yield
    finally:
        with torch.no_grad():
            for t, old in zip(tensors, before):
                t.copy_(old)
