"""ETHER+: the relaxed reflections of ETHER, on both sides of W. Bini et al., 2024."""

from typing import Annotated

import torch
from torch import nn

from ...core.hyper import Range
from .ether import PAPER, normals, spread
from .orthogonal import Turned


class ETHERPlus(Turned, name="ether_plus"):
    """W' = G W H, with H [in, in] and G [out, out] of diagonal blocks I - u u^T + v v^T, u and v unit vectors.

    u and v [2, blocks, in / blocks] are the `inputs`, those of G [2, blocks, out / blocks] the `outputs`; u is random
    and v starts at -u, where both blocks are the identity. ||H_i - I||_F <= 2 however far they move. The bias stays:
    y' = b + G (f(H x) - b), with two thin products on each side. For many tokens both sides are one change of W of rank
    4 blocks: with H = I + B A and G = I + D C, W' = W + [G W B, D] [A; C W]. The blocks are the paper's, see ETHER.
    """

    papers = (PAPER,)
    known = (
        "Its authors report results equal to or better than other methods' in image synthesis and language tasks, with "
        "10 to 100 times fewer parameters than LoRA or OFT and no long search for hyperparameters."
    )
    hosts = ("linear",)
    small = dict(blocks=2)

    def __init__(
        self,
        site,
        *,
        blocks: Annotated[int, "blocks of H and of G", Range(1)] = 1,
        one_sided: Annotated[bool, "turn the inputs only: G = I"] = False,
    ):
        super().__init__(site)
        u = normals("ether_plus", "input", site.d_in, site.path, blocks)
        self.inputs = nn.Parameter(torch.stack([u, -u]))
        self.outputs = None
        if not one_sided:
            u = normals("ether_plus", "output", site.d_out, site.path, blocks)
            self.outputs = nn.Parameter(torch.stack([u, -u]))

    def turn(self):
        return _thin(self.inputs)

    def prepare(self, inner):
        C, D = (None, None) if self.outputs is None else _thin(self.outputs)
        b = inner.bias
        return *self.turn(), C, D, None if C is None or b is None else -(C @ b.to(C.dtype))

    def forward(self, inner, x):
        if self.outputs is None or not self.joins(inner, x):
            return super().forward(inner, x)
        w = inner.weight
        A, B, C, D = (t.to(w.dtype) for t in (*self.turn(), *_thin(self.outputs)))
        left = w @ B
        left = torch.cat([left + D @ (C @ left), D], 1)
        return self.site.add_up(inner(x), self.site.down(x, torch.cat([A, C @ w])), left)

    def act(self, inner, x, A, B, C, D, shift):
        y = super().act(inner, x, A, B)
        if C is None:
            return y
        h = self.site.up(y, C)
        return self.site.add_up(y, h if shift is None else self.site.shift(h, shift), D)

    def weight(self, w):
        w = super().weight(w)
        if self.outputs is None:
            return w
        C, D = _thin(self.outputs)
        return w + D @ (C @ w)


def _thin(pair):
    """A [2 blocks, n] and B [n, 2 blocks] with I + B A = diag(I - u u^T + v v^T)."""
    u, v = map(spread, pair)
    return torch.cat([u, v]), torch.cat([-u, v]).mT
