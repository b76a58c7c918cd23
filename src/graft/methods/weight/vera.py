"""VeRA: Vector-based Random Matrix Adaptation. Kopiczko et al., 2023."""

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import nn

from ...core.delta import Delta, Paper
from ...core.drawn import uniform
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
    A [rank, largest in] and rows of B [largest out, rank]. They are not saved, unless told so: the adapter's seed gives
    the same numbers on every machine and with every version of torch, see core/drawn.py.
    """

    papers = (
        Paper(
            "VeRA: Vector-based Random Matrix Adaptation",
            "Kopiczko, Blankevoort, Asano",
            2023,
            "https://arxiv.org/abs/2310.11454",
        ),
    )
    known = (
        "Its authors report LoRA's results with far fewer trained parameters on GLUE, E2E, image classification and "
        "instruction tuning of 7B and 13B models."
    )
    version = 2  # A and B were drawn by torch before
    passes_x = True
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
    adapter_hub = "its VeRA trains whole matrices in place of the vectors d and b"

    @classmethod
    def share(cls, sites, *, rank, save_projection, **_):
        shared = nn.Module()
        shapes = {"A": (rank, max(s.d_in for s in sites)), "B": (max(s.d_out for s in sites), rank)}
        for stream, (name, shape) in enumerate(shapes.items()):
            values = uniform(shape, math.sqrt(6 / shape[1]), torch.initial_seed(), stream)
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
        save_projection: Annotated[bool, "save A and B; else they are drawn again from the adapter's seed"] = False,
    ):
        super().__init__(site, shared)
        if rank != len(shared.A):
            raise GraftError(f"vera: rank must be the same at all sites, which share A; {site.path} asks for {rank}")
        self.d = nn.Parameter(torch.full((rank,), d_init))
        self.b = nn.Parameter(torch.zeros(site.d_out))
        self.dropout = dropout

    def factors(self):
        A, d, B, b = self.prepare(None)
        return A, b[:, None] * B * d

    def prepare(self, inner):
        """A [rank, in], d, B [out, rank] and b of this site: products of them would be copies of A or B at each."""
        return self.shared.A[:, : self.site.d_in], self.d, self.shared.B[: self.site.d_out], self.b

    def act(self, inner, x, A, d, B, b):
        z = F.dropout(x, self.dropout, self.training) if self.dropout else x
        h = self.site.scale(self.site.down(z, A), d)
        return inner(x) + self.site.scale(self.site.up(h, B), b)

    def weight(self, w):
        A, d, B, b = self.prepare(None)
        return w + b[:, None] * (B @ (d[:, None] * A))
