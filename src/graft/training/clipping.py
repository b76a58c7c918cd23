"""Component-wise gradient norm clipping.

Improving Stability of Fine-Tuning Pretrained Language Models via Component-Wise Gradient Norm Clipping. Yang, Ma, 2022.
https://arxiv.org/abs/2210.10325
"""

from collections.abc import Iterable

from torch import nn


def clip_components(parameters: Iterable[nn.Parameter], limit: float) -> None:
    """g <- g min(1, limit / ||g||) for the gradient g of each tensor by itself.

    A component is a tensor, as in the authors' code (yangalan123/FineTuningStability): the weight or the bias of one
    projection. Under one norm for all, those with large gradients would slow down the others.
    """
    for p in parameters:
        if p.grad is not None:
            nn.utils.clip_grad_norm_(p, limit)
