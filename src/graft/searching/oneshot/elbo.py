"""The strength of regularisation learnt from all of the training data: the data-emphasised evidence lower bound."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.errors import GraftError


class DataEmphasizedELBO(nn.Module):
    """J = E_q[mean NLL] + KL(q || p) / (kappa n), to minimise in the weights m, in sigma and in the prior's variances.

    q = N(m, sigma^2 I) over all D weights, with one sigma. The prior is N(m_g, tau_g I) for each group g of weights;
    its mean is where the group starts, as in L2-SP, or zero. With D_g weights in a group

        KL_g  = (D_g sigma^2 / tau_g + |m - m_g|^2 / tau_g - D_g + D_g log tau_g - D_g log sigma^2) / 2
        tau_g = sigma^2 + |m - m_g|^2 / D_g,   the best there is, which is put in at every step

    so that J pulls m towards m_g with the strength 1 / (kappa n tau_g), learnt from all data. With kappa = 1 it is the
    usual bound, in which the prior wins where D is far above n; kappa = D / n gives the data as much weight.

        bound = DataEmphasizedELBO({"adapter": adapter.parameters()}, count=len(rows))
        optimizer = torch.optim.SGD([*adapter.parameters(), *bound.parameters()], lr=0.01)
        with bound.sampled():
            mean_nll(model, batch).backward()
        bound().backward()

    groups  weights by name; their prior's mean is what they are when this is made, or `means` says
    count   n, the number of training examples
    kappa   of the data; by default D / n
    sigma   to begin with

    Learning Hyperparameters via a Data-Emphasized Variational Objective. Harvey, Petrov, Hughes, 2025.
    https://arxiv.org/abs/2502.01861 The loss, KL, tau, kappa = D / n and the first sigma are those of the authors'
    code (github.com/tufts-ml/data-emphasized-ELBo).
    """

    def __init__(
        self,
        groups: dict[str, Sequence[Tensor]],
        *,
        count: int,
        kappa: float | None = None,
        means: dict[str, Sequence[Tensor]] | None = None,
        sigma: float = 1e-4,
    ):
        super().__init__()
        self.groups = {name: list(tensors) for name, tensors in groups.items()}
        self.sizes = {name: sum(t.numel() for t in tensors) for name, tensors in self.groups.items()}
        if not all(self.sizes.values()) or not self.sizes or count < 1:
            raise GraftError(f"the bound needs weights in each group and examples, not {self.sizes} and count={count}")
        own = {name: [t.detach().clone() for t in tensors] for name, tensors in self.groups.items()}
        self.means = own | {name: list(tensors) for name, tensors in (means or {}).items()}
        self.count, self.kappa = count, sum(self.sizes.values()) / count if kappa is None else kappa
        self.raw = nn.Parameter(torch.tensor(math.log(math.expm1(sigma))))

    @property
    def sigma(self) -> Tensor:
        return F.softplus(self.raw)

    def variances(self) -> dict[str, Tensor]:
        """tau of each group."""
        return {name: self.sigma.square() + self._distance(name) / size for name, size in self.sizes.items()}

    def divergence(self) -> Tensor:
        """KL(q || p) with the best tau, where the first two terms of each group add up to D_g."""
        spread = self.sigma.square().log()
        return sum(size * (tau.log() - spread) / 2 for size, tau in zip(self.sizes.values(), self.variances().values()))  # type: ignore[return-value]

    def forward(self) -> Tensor:
        """KL(q || p) / (kappa n)."""
        return self.divergence() / (self.kappa * self.count)

    @contextmanager
    def sampled(self) -> Iterator[None]:
        """The weights drawn from q, for one forward and backward pass; afterwards they are m again.

        The gradient of sigma, sum_i noise_i dL/dw_i, is added when the context ends: call backward inside.
        """
        weights = [t for tensors in self.groups.values() for t in tensors]
        before = [(w.detach().clone(), None if w.grad is None else w.grad.clone()) for w in weights]
        noise = [torch.randn_like(w) for w in weights]
        with torch.no_grad():
            for w, e in zip(weights, noise):
                w.add_(e * self.sigma.to(w.dtype))
        try:
            yield
        finally:
            with torch.no_grad():
                slope = torch.zeros(())
                for w, e, (value, grad) in zip(weights, noise, before):
                    w.copy_(value)
                    if w.grad is not None:
                        slope = slope + (e * (w.grad if grad is None else w.grad - grad)).sum().cpu()
                slope = slope * torch.sigmoid(self.raw)
                self.raw.grad = slope if self.raw.grad is None else self.raw.grad + slope

    def _distance(self, name: str) -> Tensor:
        return sum((t - m).square().sum() for t, m in zip(self.groups[name], self.means[name]))  # type: ignore[return-value]
