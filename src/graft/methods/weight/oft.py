"""OFT: Controlling Text-to-Image Diffusion by Orthogonal Finetuning. Qiu et al., 2023. In its input-centric form."""

from typing import Annotated

import torch
from torch import Tensor, nn

from ...core.delta import Delta, Paper
from ...core.errors import GraftError
from ...core.formats.peft import OWN, As, Peft
from ...core.hyper import Range
from ...core.recipe import ByPath
from .orthogonal import cayley, diagonal, fast_side, skew, turned, turned_inputs


class _OFTPeft(Peft):
    """PEFT's exact transform is that of -Q; its series of n terms is ours of n - 2, of 3 the same as of 4."""

    def site_out(self, delta):
        return {"oft_R.weight": delta.triangles if delta.terms else -delta.triangles}

    def site_in(self, site, found, config):
        state = super().site_in(site, found, config)
        return state if config.get("use_cayley_neumann", False) else {"triangles": -state["triangles"]}

    def write_config(self, method, deltas, hyper):
        terms = {h["terms"] for h in hyper.values()}
        if len(terms) > 1 or 1 in terms:
            raise GraftError(f"PEFT's OFT has one number of terms for all modules, and not one alone: {OWN}")
        (count,) = terms
        series = {"num_cayley_neumann_terms": count + 2} if count else {}
        return super().write_config(method, deltas, hyper) | {"use_cayley_neumann": bool(count), "r": 0} | series

    def read_config(self, method, config, sites, found):
        hyper = super().read_config(method, config, sites, found)
        # PEFT is told the side or the number of the blocks, and changes it where it does not divide the inputs.
        rows = {path: found[path]["oft_R.weight"].shape[0] for path in sites if "oft_R.weight" in found[path]}
        hyper["block"] = ByPath({path: sites[path].d_in // max(1, n) for path, n in rows.items()})
        if config.get("use_cayley_neumann", False):
            hyper["terms"] = max(config.get("num_cayley_neumann_terms", 5) - 2, 2)
        return hyper


def _short_series(config: dict) -> str | None:
    if config.get("use_cayley_neumann", False) and config.get("num_cayley_neumann_terms", 5) < 3:
        return "a series of fewer than 3 terms has no counterpart"
    return None


class OFT(Delta, name="oft"):
    """W' = W R^T with R block-diagonal and orthogonal, computed as f(x R): the inputs are turned, W' is never formed.

    R_n = (I + Q_n) (I - Q_n)^-1 is the Cayley transform of the skew-symmetric Q_n [block, block], whose upper
    triangles are `triangles` [in / block, block (block - 1) / 2], zero at first. With `terms` = k it is
    (I + Q_n) (I + Q_n + ... + Q_n^k), the Cayley-Neumann form of OFTv2, nearly orthogonal for small Q_n.
    PEFT's default of five terms there is k = 3 here; its exact variant has the opposite sign of Q.
    """

    papers = (
        Paper(
            "Controlling Text-to-Image Diffusion by Orthogonal Finetuning",
            "Qiu et al.",
            2023,
            "https://arxiv.org/abs/2306.07280",
        ),
        Paper("Orthogonal Finetuning Made Scalable", "Qiu et al.", 2025, "https://arxiv.org/abs/2506.19847"),
    )
    known = (
        "Its authors report better quality and faster convergence than other methods in subject-driven and "
        "controllable image generation. Turning inputs in place of weights, as here, they report up to 10 times faster "
        "training in 3 times less memory."
    )
    hosts = ("linear", "conv")
    small = dict(block=4)
    peft = _OFTPeft(
        "OFT",
        {"triangles": As("oft_R.weight")},
        config={"oft_block_size": "block"},
        fixed={"bias": "none", "coft": False, "block_share": False},
        neutral=frozenset(
            {"r", "eps", "module_dropout", "init_weights", "use_cayley_neumann", "num_cayley_neumann_terms"}
        ),
        own=frozenset({"terms"}),
        refuses=_short_series,
        hosts=("Linear",),
    )
    lycoris = "its Diag-OFT turns the outputs of a module, this OFT the inputs"
    upper: Tensor

    def __init__(
        self,
        site,
        *,
        block: Annotated[int, "side of the orthogonal blocks", Range(2)] = 32,
        terms: Annotated[int | None, "powers of Q in the Neumann series; none: the exact inverse", Range(1)] = None,
    ):
        super().__init__(site)
        if site.d_in % block:
            raise GraftError(f"oft: block {block} must divide the input size {site.d_in} of {site.path}")
        self.triangles = nn.Parameter(torch.zeros(site.d_in // block, block * (block - 1) // 2))
        self.register_buffer("upper", torch.triu_indices(block, block, 1), persistent=False)
        self.block, self.terms = block, terms

    def rotation(self):
        """R [in / block, block, block]."""
        q = self.triangles
        with torch.autocast(q.device.type, enabled=False):
            return cayley(skew(q, self.upper, self.block), self.terms)

    def prepare(self, inner):  # the inputs of a convolution are patches, which overlap
        if self.site.kind != "linear":
            return super().prepare(inner)
        return (diagonal(self.rotation(), fast_side(self.block, self.site.d_in)),)

    def act(self, inner, x, *prepared):
        if self.site.kind != "linear":
            return super().act(inner, x, *prepared)
        return turned_inputs(inner, x, [(prepared[0], 0)])

    def weight(self, w):
        R = self.rotation()
        return turned(w.to(torch.promote_types(w.dtype, R.dtype)), R.mT)
