"""ETHER: Efficient Finetuning of Large-Scale Models with Hyperplane Reflections. Bini et al., 2024."""

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.delta import Paper
from ...core.errors import GraftError
from ...core.hyper import Range
from .orthogonal import Turned

PAPER = Paper(
    "ETHER: Efficient Finetuning of Large-Scale Models with Hyperplane Reflections",
    "Bini et al.",
    2024,
    "https://arxiv.org/abs/2405.20271",
)


def normals(method: str, side: str, size: int, path: str, blocks: int) -> Tensor:
    """Random normals of hyperplanes [blocks, size / blocks], of which the direction counts."""
    if size % blocks:
        raise GraftError(f"{method}: blocks {blocks} must divide the {side} size {size} of {path}")
    return nn.init.kaiming_uniform_(torch.empty(blocks, size // blocks), a=5**0.5)


def spread(u: Tensor) -> Tensor:
    """The unit vectors of u [blocks, b] as the rows of a block-diagonal matrix [blocks, blocks b]."""
    eye = torch.eye(len(u), dtype=u.dtype, device=u.device)
    return (eye[:, :, None] * F.normalize(u, dim=-1)).flatten(1)


class ETHER(Turned, name="ether"):
    """W' = W H with H = diag(H_1, ..., H_blocks), H_i = I - 2 u_i u_i^T / ||u_i||^2: the inputs are reflected.

    u [blocks, in / blocks] is random. A reflection is never the identity, so that the adapted model does not start as
    the base: each H_i stays at the distance ||H_i - I||_F = 2, whatever the learning rate. f(x - 2 (x U^T) U) with the
    unit vectors in U [blocks, in] costs two thin products. The blocks are the paper's, of neighbouring inputs; the
    authors' code for language models reshapes W so that a block also depends on the output's row.
    """

    papers = (PAPER,)
    known = (
        "Its authors report results equal to or better than other methods' with 10 to 100 times fewer parameters than "
        "LoRA or OFT, and little harm from an unlucky learning rate. The authors of DeLoRA see its limit in the fixed "
        "strength and the very low rank of the change."
    )
    starts_as_base = False
    small = dict(blocks=2)

    def __init__(self, site, *, blocks: Annotated[int, "reflections, each of its share of the inputs", Range(1)] = 1):
        super().__init__(site)
        self.u = nn.Parameter(normals("ether", "input", site.d_in, site.path, blocks))

    def turn(self):
        U = spread(self.u)
        return U, -2 * U.mT
