"""HRA: Bridging The Gap between Low-rank and Orthogonal Adaptation via Householder Reflection Adaptation. Yuan et al.,
2024."""

from typing import Annotated

import torch
from torch import nn

from ...core.delta import Paper
from ...core.errors import GraftError
from ...core.formats.peft import OWN, As, Peft
from ...core.hyper import Range
from .orthogonal import Turned


def _square(site, U):
    """U itself: of a convolution's settings PEFT follows one stride and one padding."""
    host = site.module
    if site.kind == "conv" and (
        host.groups > 1 or host.dilation != (1, 1) or host.padding_mode != "zeros" or isinstance(host.padding, str)
        or any(len({*sizes}) > 1 for sizes in (host.kernel_size, host.stride, host.padding))
    ):  # fmt: skip
        raise GraftError(
            f"PEFT's HRA computes something else at {site.path}, a convolution with groups, dilation, a padding mode "
            f"or different sizes per axis: {OWN}"
        )
    return U


class HRA(Turned, name="hra"):
    """W' = W H_1 ... H_rank with H_i = I - 2 u_i u_i^T / ||u_i||^2: the inputs are reflected.

    The u_i are the columns of U [in, rank]. The product is I - U T U^T with T = (triu(G, 1) + diag(G) / 2)^-1 and
    G = U^T U [rank, rank] (the compact WY form), so that all reflections cost two thin products: f(x - (x U) (U T)^T).
    They start in equal pairs, whose product is the identity. The columns need not be orthogonal to each other (the
    paper's lambda = 0, PEFT's apply_GS=False).
    """

    papers = (
        Paper(
            "Bridging The Gap between Low-rank and Orthogonal Adaptation via Householder Reflection Adaptation",
            "Yuan et al.",
            2024,
            "https://arxiv.org/abs/2405.17484",
        ),
        Paper(
            "Accumulating Householder Transformations, Revisited",
            "Joffrain et al.",
            2006,
            "https://doi.org/10.1145/1141885.1141886",
        ),
    )
    known = (
        "Its authors report better results with fewer parameters than other methods, for large language models and "
        "conditional image generators."
    )
    small = dict(rank=2)
    peft = Peft(
        "HRA",
        {"U": As("hra_u", _square, _square)},
        config={"r": "rank"},
        fixed={"bias": "none", "apply_GS": False},
        neutral=frozenset({"init_weights"}),
        hosts=("Linear", "Conv2d"),
    )

    def __init__(self, site, *, rank: Annotated[int, "number of reflections, an even one", Range(2)] = 8):
        super().__init__(site)
        if rank % 2:
            raise GraftError(f"hra: rank must be even (reflections start in pairs), not {rank}")
        half = torch.empty(site.d_in, rank // 2)
        nn.init.kaiming_uniform_(half, a=5**0.5)
        self.U = nn.Parameter(half.repeat_interleave(2, dim=1))

    def turn(self):
        U = self.U
        with torch.autocast(U.device.type, enabled=False):
            G = U.mT @ U
            half = G.diagonal(dim1=-2, dim2=-1).diag_embed() / 2
            return U.mT, -torch.linalg.solve_triangular(G.triu(1) + half, U, upper=True, left=False)
