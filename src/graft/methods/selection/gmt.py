"""GMT: Enhancing Large Language Model Performance with Gradient-Based Parameter Selection. Li et al., 2024."""

from typing import Annotated

import torch

from ...core.delta import Paper
from ...core.hyper import Range
from ...core.sparse import exceeded_by
from ..weight.full import Full


class GMT(Full, name="gmt"):
    """W' = V [out, in], V trained from W, where each step takes the largest gradients of each tensor and no others.

    After the gradients of a step are accumulated, those of a tensor below its `density` largest by |dL/dV| become zero:
    V <- V - eta M(dL/dV). The choice is made anew at every step, so that all weights may move. With momentum in the
    optimizer, entries chosen before go on moving. The gradient and the optimizer state are those of full fine-tuning.

    The paper, first called "Gradient-Mask Tuning Elevates the Upper Limits of LLM Performance", could not be read
    beyond its abstract, and no code of its authors was found. From a summary (the formula of the masked update, the top
    k by |gradient| after accumulation, and that the share matters little) and from the code of source-shielded updates
    (SSU), where it is a baseline: each tensor by itself, 20 % by default.
    """

    papers = (
        Paper(
            "Enhancing Large Language Model Performance with Gradient-Based Parameter Selection",
            "Li et al.",
            2024,
            "https://arxiv.org/abs/2406.15330",
        ),
    )
    known = (
        "Its authors report better results of language models than by ordinary fine-tuning at about its cost, and "
        "little influence of the share of gradients that is kept."
    )
    targets = "all-linear"
    lycoris = None
    small = dict(density=0.5)

    def __init__(
        self,
        site,
        *,
        density: Annotated[float, "share of the entries of a tensor that a step moves", Range(above=0, high=1)] = 0.2,
    ):
        super().__init__(site)
        self.density = density

    @classmethod
    @torch.no_grad()
    def step(cls, deltas, progress):
        for delta in deltas:
            for p in delta.copy.parameters():
                if p.grad is not None:
                    size = p.grad.abs()
                    keep = max(1, round(delta.density * size.numel()))
                    p.grad.masked_fill_(size < exceeded_by(size, torch.tensor(keep - 1)), 0)
