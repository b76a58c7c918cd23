"""Gradient dropout: what a step would learn against the knowledge of the base is left out at random.

Regularized Mask Tuning: Uncovering Hidden Knowledge in Pre-trained Vision-Language Models. Zheng et al., 2023.
https://arxiv.org/abs/2307.15049
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..core.registry import disabled
from .evaluation import evaluating
from .objectives import Objective


class GradientDropout:
    """g <- g (1 - strength [P < U]) for each entry g of a gradient, U uniform in [0, 1) and

        P = (1 + sign(g) (g + k) / (|g| + |k|)) / 2,

    k the gradient of the cross entropy H(base, model) between what the base says and what the model says, which has
    that of their Kullback-Leibler divergence. Where the two agree in sign P is 1, and g stays.

    From the authors' code (github.com/wuw2019/R-AMT, trainers/masktuning.py, whose temperature is 1).
    """

    def __init__(self, model: nn.Module, parameters: Iterable[nn.Parameter], strength: float):
        self.model, self.strength = model, strength
        self.known: dict[nn.Parameter, Tensor | None] = dict.fromkeys(parameters)

    def loss(self, task: Objective, model: nn.Module, batch: dict[str, Tensor], terms: int) -> Tensor:
        """The sum over one of the batches of a step of so many terms; on the way it takes in what the base says."""
        with torch.no_grad(), disabled(self.model), evaluating(self.model):
            base = task.loss(self.model, batch)[1].float()
        loss, said = task.loss(model, batch)
        with torch.autocast(said.device.type, enabled=False):
            distance = -(base.softmax(-1) * said.float().log_softmax(-1)).sum() / terms
            found = torch.autograd.grad(distance, [*self.known], retain_graph=True, allow_unused=True)
        for p, new in zip(self.known, found):
            old = self.known[p]
            self.known[p] = old if new is None else new if old is None else old + new
        return loss

    @torch.no_grad()
    def apply(self) -> None:
        """Change the gradients of a step, after the backward of all its batches."""
        for p, k in self.known.items():
            if (g := p.grad) is not None and k is not None:
                sizes = (g.abs() + k.abs()).clamp(min=torch.finfo(g.dtype).tiny)
                keep = (1 + g.sign() * (g + k) / sizes) / 2
                g.mul_(1 - self.strength * (keep < torch.rand_like(g)))
            self.known[p] = None
