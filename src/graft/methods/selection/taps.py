"""TAPS: Task Adaptive Parameter Sharing for Multi-Task Learning. Wallingford et al., 2022."""

from functools import partial
from typing import Annotated

import torch
from torch import Tensor, nn

from ...core.delta import Delta, Paper
from ...core.hyper import Range


class TAPS(Delta, name="taps"):
    """W' = W + 1[s >= threshold] D: each matrix W [out, in] learns whether it changes at all.

    D [out, in] starts at zero and the score s at `start`, above the threshold. The gradient of the indicator is passed
    straight through to s, and the penalty strength / L sum |s| over the L adapted matrices draws the scores down. A
    matrix whose score is below is W to the bit; D then waits, and learns on if the score returns.

    From the code of the paper's first author (github.com/MattWallingford/TAPS: threshold 0.1, scores from 0.15,
    strength 1), which begins the penalty after two epochs, has norms of each task, and gives the scores a rate of
    their own (0.01).
    """

    papers = (
        Paper(
            "Task Adaptive Parameter Sharing for Multi-Task Learning",
            "Wallingford et al.",
            2022,
            "https://arxiv.org/abs/2203.16708",
        ),
    )
    known = (
        "Its authors report state-of-the-art results on suites of image tasks with few parameters for each task, with "
        "ResNet, DenseNet and ViT."
    )

    def __init__(
        self,
        site,
        *,
        threshold: Annotated[float, "least score of a matrix that changes", Range(above=0)] = 0.1,
        start: Annotated[float, "first value of the scores", Range(above=0)] = 0.15,
        strength: Annotated[float, "weight of the penalty", Range(0)] = 1.0,
    ):
        super().__init__(site)
        self.s = nn.Parameter(torch.tensor([start]))
        self.D = nn.Parameter(torch.zeros(site.d_out, site.d_in))
        self.strength, self.threshold = strength, threshold

    def forward(self, inner, x):
        form = partial(_changed, self.threshold)
        return self.site.apply_formed(x, form, inner.weight, self.bias(inner.bias), self.D, self.s)

    def weight(self, w):
        return _changed(self.threshold, w, self.D, self.s)

    @classmethod
    def penalty(cls, deltas):
        return deltas[0].strength * torch.cat([d.s for d in deltas]).abs().mean()


def _changed(threshold: float, w: Tensor, D: Tensor, s: Tensor) -> Tensor:
    return w + ((s >= threshold).to(s.dtype) + s - s.detach()) * D
