"""MiSS: Matrix Shard Sharing. Kang and Yin, 2024 (first versions of the paper were called Bone)."""

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import nn

from ...core.delta import Delta, Paper
from ...core.formats.peft import As, Peft
from ...core.hyper import Range


class _MissPeft(Peft):
    """PEFT's init_weights="mini" keeps a shard [rank, mini_r], which stands side by side in D."""

    def write_config(self, method, deltas, hyper):
        return super().write_config(method, deltas, hyper) | {"init_weights": True}

    def site_in(self, site, found, config):
        D = super().site_in(site, found, config)["D"]
        return {"D": D.repeat(1, site.d_out // D.shape[1]) if config.get("init_weights") == "mini" else D}


class MiSS(Delta, name="miss"):
    """W' = W + [D^T D^T ... D^T], one shard D [rank, out] shared by all groups of `rank` inputs.

    Computed as y + (sum_k x[k rank : (k + 1) rank]) D: the input is folded before one thin product. D starts at zero.
    Where rank does not divide the number of inputs, the last shard is cut. Dropout falls on the input of the update.
    """

    papers = (
        Paper(
            "MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing Structure",
            "Kang and Yin",
            2024,
            "https://arxiv.org/abs/2409.15371",
        ),
    )
    known = (
        "Its authors report more than LoRA and its best known variants in quality, in the time to start and in "
        "training throughput."
    )
    hosts = ("linear",)
    passes_x = True
    small = dict(rank=3)
    neutral = {"D": 0.0}
    peft = _MissPeft(
        "MISS",
        {"D": As("miss_block")},
        config={"r": "rank", "miss_dropout": "dropout"},
        fixed={"bias": "none"},
        neutral=frozenset({"init_weights", "mini_r"}),
        refuses=lambda config: "it is Bone" if config.get("init_weights") == "bat" else None,
        hosts=("Linear",),
    )

    def __init__(
        self,
        site,
        *,
        rank: Annotated[int, "size of a shard along the inputs", Range(1)] = 64,
        dropout: Annotated[float, "probability of dropping an input of the update", Range(0, below=1)] = 0.0,
    ):
        super().__init__(site)
        self.D = nn.Parameter(torch.zeros(rank, site.d_out))
        self.rank, self.dropout = rank, dropout

    def factors(self):
        D, shards = self.D, -(-self.site.d_in // self.rank)
        fold = torch.eye(self.rank, dtype=D.dtype, device=D.device).repeat(1, shards)
        return fold[:, : self.site.d_in], D.T

    def prepare(self, inner):
        return (self.D.T,)

    def act(self, inner, x, B):
        z = F.dropout(x, self.dropout, self.training) if self.dropout else x
        if lacking := -z.shape[-1] % self.rank:
            z = F.pad(z, (0, lacking))
        return self.site.add_up(inner(x), z.unflatten(-1, (-1, self.rank)).sum(-2), B)

    def weight(self, w):
        shards = -(-w.shape[1] // len(self.D))
        return w + self.D.T.repeat(1, shards)[:, : w.shape[1]]
