"""RandLoRA: Full-rank parameter-efficient fine-tuning of large models. Albert et al., 2025."""

import math
from typing import Annotated

import torch
from torch import Tensor, nn

from ...core.delta import Delta, Paper
from ...core.errors import GraftError
from ...core.formats.peft import UNREAD, As, Peft
from ...core.hyper import Range


class _RandPeft(Peft):
    """PEFT draws its bases again where they are not saved, in bfloat16 or not as the machine has it: they are saved.

    Its own files hold them once more at every module.
    """

    def site_in(self, site, found, config):
        return {k: v for k, v in super().site_in(site, found, config).items() if k not in "AB"}

    def write_config(self, method, deltas, hyper):
        return super().write_config(method, deltas, hyper) | {"save_projection": True}

    def read_config(self, method, config, sites, found):
        return super().read_config(method, config, sites, found) | {"save_projection": True}

    def shared_in(self, config, sites, state):
        if "*:A" not in state or "*:B" not in state:
            raise GraftError(f"{UNREAD}: it lacks its bases: save it with save_projection=True")
        return {}


class RandLoRA(Delta, name="randlora"):
    """W' = W + s sum over j of B_j diag(lam_j) A diag(gamma_j), of full rank, with s = alpha / rank.

    There are n = ceil(short / rank) products, `short` the smaller and `long` the larger side of W. A [rank, short] and
    B [long, n, rank] are random (uniform, of deviation 1), frozen and shared by all sites; sites of other sizes use
    their leading parts. lam [rank, n], zero at first, and gamma [n, short], 1 / max(n, short) at first, are trained;
    where W is wider than high, the sum is transposed. As in PEFT, row (r, j) of the stacked A and column (j, r) of the
    stacked B, each counted with its last index running, meet at equal places.

    For many tokens W' is formed, twice, instead of products of the size of W being kept; for few the sum acts on x.
    """

    papers = (
        Paper(
            "RandLoRA: Full-rank parameter-efficient fine-tuning of large models",
            "Albert et al.",
            2025,
            "https://arxiv.org/abs/2502.00987",
        ),
    )
    known = (
        "Its authors report that full rank helps on vision and language tasks, most where both meet: there it narrows "
        "or closes the gap between LoRA and full fine-tuning. PEFT's documentation warns of slow training with ranks "
        "below 4."
    )
    hosts = ("linear",)
    small = dict(rank=3)
    peft = _RandPeft(
        "RANDLORA",
        {
            "lam": As("randlora_lambda"),
            "gamma": As("randlora_gamma"),
            "A": As("randlora_A", optional=True),
            "B": As("randlora_B", optional=True),
        },
        shared={"A": As("randlora_A"), "B": As("randlora_B")},
        config={"r": "rank", "randlora_alpha": "alpha"},
        fixed={"bias": "none"},
        neutral=frozenset(
            {"save_projection", "projection_prng_key", "sparse", "very_sparse", "init_weights", "randlora_dropout"}
        ),
        own=frozenset({"save_projection"}),
        hosts=("Linear", "Conv1D"),
    )

    @classmethod
    def share(cls, sites, *, rank, save_projection, **_):
        short, long = sorted((max(s.d_in for s in sites), max(s.d_out for s in sites)))
        shared = nn.Module()
        for name, shape in {"A": (rank, 1, short), "B": (long, math.ceil(short / rank), rank)}.items():
            values = torch.empty(shape).uniform_(-math.sqrt(3), math.sqrt(3))
            shared.register_buffer(name, values, persistent=save_projection)
        return shared

    def __init__(
        self,
        site,
        shared,
        *,
        rank: Annotated[int, "rank of each product; the smaller, the more products and parameters", Range(1)] = 32,
        alpha: Annotated[float, "numerator of the scaling s"] = 640.0,
        save_projection: Annotated[bool, "save A and B; else they are drawn again from the adapter's seed"] = False,
    ):
        super().__init__(site, shared)
        if rank != len(shared.A):
            raise GraftError(
                f"randlora: rank must be the same at all sites, which share A; {site.path} asks for {rank}"
            )
        self.short = min(site.d_in, site.d_out)
        count = math.ceil(self.short / rank)
        self.lam = nn.Parameter(torch.zeros(rank, count))
        self.gamma = nn.Parameter(torch.full((count, self.short), 1 / max(count, self.short)))
        self.scaling = alpha / rank

    def _bases(self) -> tuple[Tensor, Tensor]:
        """A [rank, 1, short] and B [long, n, rank] of this site."""
        long = max(self.site.d_in, self.site.d_out)
        return self.shared.A[:, :, : self.short], self.shared.B[:long, : self.lam.shape[1]]

    def prepare(self, inner):
        return self.factors()

    def factors(self):
        return _factors(*self._bases(), self.scaling * self.lam, self.gamma, self.site.d_in == self.short)

    def forward(self, inner, x):
        site = self.site
        tokens = x.numel() // site.d_in
        if 2 * tokens * (site.d_in + site.d_out) < 3 * site.d_in * site.d_out:  # a step takes fewer products this way
            A, B = self.prepared(inner, x.dtype)
            return site.add_up(inner(x), site.down(x, A), B)
        form = _tall if site.d_in == self.short else _wide
        given = (*self._bases(), self.scaling * self.lam, self.gamma)
        return site.apply_formed(x, form, inner.weight, self.bias(inner.bias), *given)

    def weight(self, w):
        A, B = self.factors()
        return w + B @ A


def _factors(A, B, lam, gamma, tall):
    """A' [k, in] and B' [out, k] of the change B' A'."""
    left, right = (lam[:, :, None] * A * gamma).flatten(0, 1), B.flatten(1)
    return (left, right) if tall else (right.T, left.T)


def _tall(w, A, B, lam, gamma):
    left, right = _factors(A, B, lam, gamma, True)
    return torch.addmm(w, right, left)


def _wide(w, A, B, lam, gamma):
    left, right = _factors(A, B, lam, gamma, False)
    return torch.addmm(w, right, left)
