"""GreenTrainer: Towards Green AI in Fine-tuning Large Language Models via Adaptive Backpropagation. Huang et al.,
2023."""

import math
from typing import Annotated

import torch

from ...core.delta import Paper
from ...core.errors import GraftError
from ...core.hyper import Range
from ..weight.full import Full

_UNITS = 1000  # in which a budget is counted


class GreenTrainer(Full, name="greentrainer"):
    """W' = V at chosen matrices W [out, in], V trained from W: those that promise most for the cost of their backward.

    For matrices 1 .. N in the order of the forward, the backward costs

        sum of t_dw over the chosen + sum of t_dy from the first chosen to the last matrix,

    since a gradient has to come down to the first: t_dw = t_dy = out in multiplications a token. Chosen is the set with
    the largest sum of I whose cost fits, found exactly by dynamic programming (over a thousandth of the full cost). Of
    the full cost of training, forward included, the share `rho` may be spent. I = ||dL/dW||^2 over the batches given to
    `graft.collect` is the fall of the loss, to first order, for a small step of gradient descent. Matrices that are not
    chosen are left alone: no gradient, no optimizer state.

    From the authors' code (github.com/pittisl/GreenTrainer, decoder_lm/tensor_selector.py and train.py), which counts
    the attention product, biases and norms as well, takes I from a step of its optimizer, and chooses anew each epoch:
    here the choice is made once.
    """

    papers = (
        Paper(
            "Towards Green AI in Fine-tuning Large Language Models via Adaptive Backpropagation",
            "Huang et al.",
            2023,
            "https://arxiv.org/abs/2309.13192",
        ),
    )
    known = (
        "Its authors report up to 64 % fewer operations than full fine-tuning without noticeable loss in abstractive "
        "summarisation, and up to 4 % better results than LoRA for the same saving."
    )
    hosts = ("linear",)
    targets = "all-linear"
    needs = ("weight_grad",)
    lycoris = None
    small = dict(rho=1.0)

    @classmethod
    def plan(cls, sites, hypers):
        costs = [site.d_out * site.d_in for site in sites]
        gains = [site.stats["weight_grad"].double().square().sum().item() for site in sites]
        if not any(gains):
            raise GraftError(
                "greentrainer: no gradient reaches its targets: collect statistics while no adapter replaces them"
            )
        backward = 1.5 * min(one["rho"] for one in hypers.values()) - 0.5  # the forward is a third of all
        chosen = best_backward(costs, costs, gains, backward)
        if not chosen:
            raise GraftError(
                f"greentrainer: rho is too low for the backward of any of the {len(sites)} targets: raise it"
            )
        return {sites[i].path: hypers[sites[i].path] for i in chosen}

    def __init__(
        self, site, *, rho: Annotated[float, "share of the cost of full training", Range(above=1 / 3, high=1)] = 0.5
    ):
        super().__init__(site)


def best_backward(t_dy: list[int], t_dw: list[int], gains: list[float], share: float) -> list[int]:
    """The tensors, in the order of the forward, whose gains sum to the most in `share` of the full backward."""
    full = sum(t_dy) + sum(t_dw)
    limit = math.floor(share * _UNITS)
    most, first, kept = 0.0, None, {}
    best = torch.zeros(limit + 1, dtype=torch.float64)  # by what is spent on the t_dw of those behind
    passed = 0
    for i in reversed(range(len(gains))):
        passed += t_dy[i]
        own = math.ceil(t_dw[i] * _UNITS / full - 1e-9)
        left = limit - math.ceil(passed * _UNITS / full - 1e-9) - own
        if left < 0 and passed * _UNITS > limit * full:
            break
        if left >= 0 and best[left] + gains[i] > most:
            most, first, spend = (best[left] + gains[i]).item(), i, left
        taken = torch.full_like(best, -math.inf)
        taken[own:] = best[: limit + 1 - own] + gains[i] if own <= limit else -math.inf
        kept[i] = own, taken > best
        best = torch.maximum(best, taken)
    chosen = []
    if first is not None:
        chosen = [first]
        for i in range(first + 1, len(gains)):
            own, takes = kept[i]
            if takes[spend]:
                chosen.append(i)
                spend -= own
    return chosen
