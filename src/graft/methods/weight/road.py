"""RoAd, from 3-in-1: 2D Rotary Adaptation for Efficient Finetuning, Efficient Batching and Composability. Liao, Monz,
2024."""

from typing import Annotated, Literal

import torch
from torch import nn

from ...core.delta import Delta, Paper
from ...core.errors import GraftError
from ...core.formats.peft import As, Peft
from ...core.hyper import Range


class _RoadPeft(Peft):
    def write_config(self, method, deltas, hyper):
        config = super().write_config(method, deltas, hyper)
        return config | {"variant": f"road_{config['variant']}"}

    def read_config(self, method, config, sites, found):
        if (variant := config.get("variant")) not in ("road_1", "road_2", "road_4"):
            raise GraftError(f"PEFT's RoAd has no variant {variant!r}; there are road_1, road_2 and road_4")
        return super().read_config(method, config | {"variant": int(variant[-1])}, sites, found)


class RoAd(Delta, name="road"):
    """y' = R y for the output y = W x + b of the host: W' = R W, b' = R b, with R [out, out] of 2 x 2 blocks.

    Outputs 1 and 2 of a pair become y_1' = c_1 y_1 - s_1 y_2 and y_2' = s_2 y_1 + c_2 y_2, with c = a cos(t) and
    s = a sin(t). Of the angles t (`angle`, zero at first) and the scales a (`scale`, one at first) there are, per pair,

        variant 1   one each: a rotation and a stretching; `angle` and `scale` are [out / 2]
        variant 2   one each per output; [out]
        variant 4   one each for every entry c_1, c_2, s_1, s_2; [2 out]

    Feature i of the first half of a group of `group` outputs is paired with feature i of the second half.
    """

    papers = (
        Paper(
            "3-in-1: 2D Rotary Adaptation for Efficient Finetuning, Efficient Batching and Composability",
            "Liao, Monz",
            2024,
            "https://arxiv.org/abs/2409.00119",
        ),
    )
    known = (
        "PEFT's documentation, after the authors: results equal to or better than other methods' with under 0.1 % "
        "trained parameters, and high throughput where rows of a batch have adapters of their own."
    )
    hosts = ("linear", "embedding")
    passes_x = True
    small = dict(group=4)
    peft = _RoadPeft(
        "ROAD",
        {"angle": As("road_theta"), "scale": As("road_alpha")},
        config={"variant": "variant", "group_size": "group"},
        neutral=frozenset({"init_weights"}),
        hosts=("Linear",),
    )

    def __init__(
        self,
        site,
        *,
        variant: Annotated[Literal[1, 2, 4], "angles and scales per pair of outputs"] = 1,
        group: Annotated[int, "outputs of which the first half is paired with the second", Range(2)] = 64,
    ):
        super().__init__(site)
        if group % 2 or site.d_out % group:
            raise GraftError(f"road: group {group} must be even and divide the output size {site.d_out} of {site.path}")
        self.variant, self.group = variant, group
        self.angle = nn.Parameter(torch.zeros(variant * site.d_out // 2))
        self.scale = nn.Parameter(torch.ones(variant * site.d_out // 2))

    def prepare(self, inner):
        """c and s, [groups, 2, group / 2] or, where both of a pair share them, [groups, 1, group / 2]."""
        angle, scale = (t.view(-1, self.variant, self.group // 2) for t in (self.angle, self.scale))
        c, s = scale * angle.cos(), scale * angle.sin()
        return (c[:, :2], s[:, 2:]) if self.variant == 4 else (c, s)

    def act(self, inner, x, c, s):
        y = inner(x)
        return self.rotated(y, c.to(y.dtype), s.to(y.dtype))

    def rotated(self, y, c, s):
        """R y over the last axis."""
        first, second = y.unflatten(-1, (-1, 2, self.group // 2)).unbind(-2)
        turned = (c[:, 0] * first - s[:, 0] * second, c[:, -1] * second + s[:, -1] * first)
        return torch.stack(turned, -2).flatten(-3)

    def weight(self, w):
        return self.rotated(w.mT, *self.prepare(None)).mT

    def bias(self, b):
        return b if b is None else self.rotated(b, *self.prepare(None))
