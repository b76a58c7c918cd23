"""VeRA: Vector-based Random Matrix Adaptation. Kopiczko et al., 2023."""

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import nn

from ...core.delta import Delta, Paper
from ...core.errors import GraftError
from ...core.formats.peft import As, Peft
from ...core.hyper import Range


class _VeraPeft(Peft):
    """PEFT draws A and B again from `projection_prng_key` where they are not saved; here they are kept then."""

    def write_config(self, method, deltas, hyper):
        return super().write_config(method, deltas, hyper) | {"save_projection": True}

    def read_config(self, method, config, sites, found):
        return super().read_config(method, config, sites, found) | {"save_projection": True}

    def shared_in(self, config, sites, state):
        if "*:A" in state or config.get("save_projection", True):
            return {}
        rank, generator = config["r"], torch.Generator().manual_seed(config.get("projection_prng_key") or 0)
        made = {}
        for name, rows, columns in (
            ("*:A", rank, max(s.d_in for s in sites.values())),
            ("*:B", max(s.d_out for s in sites.values()), rank),
        ):
            bound = math.sqrt(3) * (math.sqrt(2) / math.sqrt(columns))  # in this order: the last bit counts
            made[name] = torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)
        return made


class VeRA(Delta, name="vera"):
    """W' = W + diag(b) B diag(d) A, computed as y + b * (B (d * (A x))).

    A and B are random (Kaiming uniform), frozen and shared by all sites; only d [rank], which starts at `d_init`, and
    b [out], which starts at zero, are trained. Sites of different sizes use the leading columns of
    A [rank, largest in] and rows of B [largest out, rank].
    """

    papers = (
        Paper(
            "VeRA: Vector-based Random Matrix Adaptation",
            "Kopiczko, Blankevoort, Asano",
            2023,
            "https://arxiv.org/abs/2310.11454",
        ),
    )
    small = dict(rank=6)
    peft = _VeraPeft(
        "VERA",
        {"d": As("vera_lambda_d"), "b": As("vera_lambda_b")},
        shared={"A": As("vera_A"), "B": As("vera_B")},
        config={"r": "rank", "d_initial": "d_init", "vera_dropout": "dropout"},
        fixed={"bias": "none"},
        neutral=frozenset({"save_projection", "projection_prng_key", "init_weights"}),
        own=frozenset({"save_projection"}),
        hosts=("Linear", "Conv1D"),
    )

    @classmethod
    def share(cls, sites, *, rank, save_projection, **_):
        shared = nn.Module()
        shapes = {"A": (rank, max(s.d_in for s in sites)), "B": (max(s.d_out for s in sites), rank)}
        for name, shape in shapes.items():
            values = nn.init.kaiming_uniform_(torch.empty(shape))
            shared.register_buffer(name, values, persistent=save_projection)
        return shared

    def __init__(
        self,
        site,
        shared,
        *,
        rank: Annotated[
            int, "rows of A and columns of B; higher than LoRA's, for it costs few parameters", Range(1)
        ] = 256,
        d_init: Annotated[float, "start of d"] = 0.1,
        dropout: Annotated[float, "probability of dropping an input of the update", Range(0, below=1)] = 0.0,
        save_projection: Annotated[bool, "save A and B; else they are drawn again from the adapter's seed"] = True,
    ):
        super().__init__(site, shared)
        if rank != len(shared.A):
            raise GraftError(f"vera: rank must be the same at all sites, which share A; {site.path} asks for {rank}")
        self.d = nn.Parameter(torch.full((rank,), d_init))
        self.b = nn.Parameter(torch.zeros(site.d_out))
        self.dropout = dropout

    def projections(self):
        """A [rank, in] and B [out, rank] of this site."""
        return self.shared.A[:, : self.site.d_in], self.shared.B[: self.site.d_out]

    def forward(self, inner, x):
        A, B = self.projections()
        z = F.dropout(x, self.dropout, self.training) if self.dropout else x
        h = self.site.scale(self.site.down(z, A), self.d)
        return inner(x) + self.site.scale(self.site.up(h, B), self.b)

    def weight(self, w):
        A, B = self.projections()
        return w + self.b[:, None] * (B @ (self.d[:, None] * A))
