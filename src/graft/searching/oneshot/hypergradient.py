"""Hypergradients: how the validation loss at the trained weights changes with a hyperparameter of the training loss."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...core.adapter import Adapter
from ...core.errors import GraftError

Loss = Callable[[], Tensor]


def hypergradient(
    train: Loss, validation: Loss, weights: Sequence[Tensor], hypers: Sequence[Tensor], *, rate: float, terms: int = 20
) -> list[Tensor]:
    """dL_V/dh of L_V(w*(h), h), where w*(h) minimises L_T(w, h) and `weights` hold w*, or nearly do.

        dL_V/dh = pL_V/ph - (pL_V/pw) H^-1 (p2L_T / pw ph),    H = p2L_T / pw2
        H^-1    = rate sum_{j = 0 ... terms} (I - rate H)^j    as terms grow, for 0 < rate < 2 / (largest eigenvalue)

    by the implicit function theorem and a Neumann series of Hessian-vector products, which needs the memory of a few
    gradients whatever the number of steps that led to w*. With terms = t it is what backward through the last t + 1
    steps of gradient descent gives. The series ends early where its terms no longer shrink, as at a saddle.

    train, validation  give L_T and L_V, scalars which depend on `weights` and `hypers`; both are differentiated twice
    rate               of that descent, which the weights have been trained with

    Optimizing Millions of Hyperparameters by Implicit Differentiation. Lorraine, Vicol, Duvenaud, 2020.
    https://arxiv.org/abs/1911.02590 Scalable Nested Optimization for Deep Learning. Lorraine, 2024.
    https://arxiv.org/abs/2407.01526 The authors' code (github.com/lorraine2/implicit-hyper-opt) leaves the factor
    `rate` out and squares the gradient in place of H.
    """
    if rate <= 0 or terms < 0:
        raise GraftError(f"a hypergradient needs rate above 0 and terms of at least 0, not {rate} and {terms}")
    every = [*weights, *hypers]
    found = [torch.zeros_like(p) if g is None else g for p, g in zip(every, _gradients(validation(), every))]
    v, direct = found[: len(weights)], found[len(weights) :]
    slope = [
        torch.zeros_like(w) if g is None else g
        for w, g in zip(weights, _gradients(train(), weights, create_graph=True))
    ]
    total, size = list(v), _size(v)
    for _ in range(terms):
        bent = _product(slope, weights, v)
        v = [a - rate * b for a, b in zip(v, bent)]
        if not (smaller := _size(v)) < size:
            break
        total, size = [a + b for a, b in zip(total, v)], smaller
    return [a - rate * b for a, b in zip(direct, _product(slope, hypers, total))]


def descend(
    train: Loss,
    validation: Loss,
    weights: Sequence[Tensor],
    hypers: Sequence[Tensor],
    *,
    rounds: int,
    steps: int = 20,
    rate: float = 0.1,
    hyper_rate: float = 0.1,
    terms: int = 20,
) -> list[float]:
    """Train weights and hyperparameters in turn, in one run; L_V after each round.

    A round is `steps` of gradient descent of L_T in the weights at `rate`, and one step of Adam in the hyperparameters
    at `hyper_rate` along the hypergradient. Both are changed in place.
    """
    tuner, losses = torch.optim.Adam(hypers, lr=hyper_rate), []
    for _ in range(rounds):
        for _ in range(steps):
            with torch.no_grad():
                for w, g in zip(weights, _with_grad(train, weights)):
                    if g is not None:
                        w.sub_(g, alpha=rate)
        for h, g in zip(hypers, hypergradient(train, validation, weights, hypers, rate=rate, terms=terms)):
            h.grad = g
        tuner.step()
        tuner.zero_grad()
        losses.append(float(validation().detach()))
    return losses


def l2(adapter: Adapter, strengths: Tensor) -> Tensor:
    """sum over the sites i of exp(strengths[i]) / 2 times the sum of the squares of the parameters there.

    A penalty with a strength of its own at every site, to be added to the loss that `descend` trains with.
    """
    norms = [sum(p.square().sum() for p in d.parameters()) for d in adapter.deltas.values()]
    if strengths.shape != (len(norms),):
        raise GraftError(f"strengths must have one number for each of the {len(norms)} sites, not {strengths.shape}")
    return (strengths.exp() / 2 * torch.stack([torch.as_tensor(n) for n in norms])).sum()


@torch.enable_grad()
def _with_grad(loss: Loss, tensors: Sequence[Tensor]) -> list[Tensor | None]:
    return _gradients(loss(), tensors)


def _gradients(loss: Tensor, tensors: Sequence[Tensor], create_graph: bool = False) -> list[Tensor | None]:
    return list(torch.autograd.grad(loss, list(tensors), create_graph=create_graph, allow_unused=True))


def _product(slope: Sequence[Tensor], tensors: Sequence[Tensor], v: Sequence[Tensor]) -> list[Tensor]:
    """d(slope . v) / d tensors."""
    kept = [(s, x) for s, x in zip(slope, v) if s.requires_grad]
    if not kept:
        return [torch.zeros_like(t) for t in tensors]
    outputs, grads = zip(*kept)
    found = torch.autograd.grad(outputs, list(tensors), grads, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(tensors, found)]


def _size(tensors: Sequence[Tensor]) -> float:
    return float(sum(t.detach().square().sum() for t in tensors))
