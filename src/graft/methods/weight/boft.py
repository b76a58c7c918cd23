"""BOFT: Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization. Liu et al., 2023."""

import functools
from typing import Annotated

import torch
from torch import Tensor, nn

from ...core.delta import Delta, Paper
from ...core.errors import GraftError
from ...core.formats.peft import As, Peft
from ...core.hyper import Range
from ...core.recipe import ByPath
from .orthogonal import WIDE, cayley, diagonal, fast_side, skew, turned, turned_inputs


class _BOFTPeft(Peft):
    """PEFT keeps whole matrices, of which it takes the skew-symmetric part, and turns by the transform of -Q."""

    def site_out(self, delta):
        return {"boft_R": -skew(delta.triangles, delta.upper, delta.block), "boft_s": delta.scale[:, None]}

    def site_in(self, site, found, config):
        state = super().site_in(site, found, config)
        R = state["triangles"]
        upper = torch.triu_indices(R.shape[-1], R.shape[-1], 1)
        return {"triangles": ((R.mT - R) / 2)[..., upper[0], upper[1]], "scale": state["scale"].flatten()}

    def write_config(self, method, deltas, hyper):
        return super().write_config(method, deltas, hyper) | {"boft_block_num": 0}

    def read_config(self, method, config, sites, found):
        hyper = super().read_config(method, config, sites, found)
        # PEFT is told the side or the number of the blocks, and makes do with one factor where it lacks its own kernel.
        shapes = {path: found[path]["boft_R"].shape for path in sites if "boft_R" in found[path]}
        hyper["block"] = ByPath({path: shape[-1] for path, shape in shapes.items()})
        return hyper | {"factors": ByPath({path: shape[0] for path, shape in shapes.items()})}


class BOFT(Delta, name="boft"):
    """W' = diag(scale) W (B_m ... B_1)^T with orthogonal butterfly factors B_i, computed as scale * f(x B_m ... B_1):
    the inputs are turned block by block, no matrix [in, in] is formed.

    B_1 is block-diagonal, which alone is OFT. B_i+1 turns blocks that take half of their `block` features from each
    half of a part of 2^i block features; m = `factors` make orthogonal blocks of side 2^(m-1) block from m in block
    numbers. A block is the Cayley transform (I + Q) (I - Q)^-1 of the skew-symmetric Q [block, block] with the upper
    triangles `triangles` [factors, in / block, block (block - 1) / 2], zero at first; scale [out] starts at one and
    does not act on the bias. Defaults are PEFT's, whose transform is that of -Q.
    """

    papers = (
        Paper(
            "Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization",
            "Liu et al.",
            2023,
            "https://arxiv.org/abs/2311.06243",
        ),
    )
    known = (
        "Its authors use fewer parameters than OFT on vision transformers, language models and text-to-image "
        "diffusion. PEFT's documentation names time of computation as the price."
    )
    hosts = ("linear", "conv")
    small = dict(block=2, factors=2)
    peft = _BOFTPeft(
        "BOFT",
        {"triangles": As("boft_R"), "scale": As("boft_s")},
        config={"boft_block_size": "block", "boft_n_butterfly_factor": "factors"},
        fixed={"bias": "none", "boft_dropout": 0.0},
        neutral=frozenset({"boft_block_num", "init_weights"}),
        hosts=("Linear",),
    )
    upper: Tensor

    def __init__(
        self,
        site,
        *,
        block: Annotated[int, "side of the orthogonal blocks", Range(2)] = 4,
        factors: Annotated[int, "butterfly factors m", Range(1, 30)] = 1,
    ):
        super().__init__(site)
        whole = block << (factors - 1)
        if site.d_in % whole:
            raise GraftError(
                f"boft: block times 2^(factors - 1) = {whole} must divide the input size {site.d_in} of {site.path}"
            )
        if factors > 1 and block % 2:
            raise GraftError(f"boft: block must be even where there are several factors, not {block}")
        self.triangles = nn.Parameter(torch.zeros(factors, site.d_in // block, block * (block - 1) // 2))
        self.scale = nn.Parameter(torch.ones(site.d_out))
        self.register_buffer("upper", torch.triu_indices(block, block, 1), persistent=False)
        self.block = block
        self.joined = sum(level == 0 or block << level <= 2 * WIDE for level in range(factors))

    def rotations(self):
        """The blocks [in / block, block, block] of each factor."""
        with torch.autocast(self.scale.device.type, enabled=False):
            return cayley(skew(self.triangles, self.upper, self.block)).unbind()

    def prepare(self, inner):  # the inputs of a convolution are patches, which overlap
        if self.site.kind != "linear":
            return super().prepare(inner)
        R = self.rotations()
        side = fast_side(self.block << (self.joined - 1), self.site.d_in)
        first = (diagonal(blocks, side, level) for level, blocks in enumerate(R[: self.joined]))
        return self.scale - 1, inner.bias, functools.reduce(lambda low, high: high @ low, first), *R[self.joined :]

    def act(self, inner, x, *prepared):
        if self.site.kind != "linear":
            return super().act(inner, x, *prepared)
        gain, bias, *R = prepared
        higher = [(blocks, self.joined + i) for i, blocks in enumerate(R[1:])]
        return self.site.rescale(turned_inputs(inner, x, [*reversed(higher), (R[0], 0)]), gain, bias)

    def weight(self, w):
        R = self.rotations()
        w = w.to(torch.promote_types(w.dtype, self.scale.dtype))
        for level, blocks in enumerate(R):
            w = turned(w, blocks.mT, level)
        return self.site.rows(self.scale) * w
