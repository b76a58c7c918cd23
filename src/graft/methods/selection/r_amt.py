"""R-AMT: Regularized Mask Tuning. Zheng et al., 2023."""

from typing import Annotated

import torch
from torch import Tensor, nn

from ...core.delta import Delta, Paper
from ...core.errors import GraftError
from ...core.hyper import Range


class RAMT(Delta, name="r_amt"):
    """W' = W m, entry by entry, with m[i, j] = 1 if s[i, j] > threshold, else 0: entries of W [out, in] are left out.

    The scores s [out, in] are trained, from `start` above the threshold, so that the adapted model starts as the base.
    The gradient of the mask is passed straight through to them: dL/ds = dL/dW' W. A penalty, strength times the sum
    over the matrices of ||s||, draws them down. Of the mask one bit an entry is kept for backward, and one bit an entry
    is all that is saved; scores that come from a file begin as far above or below the threshold as `start` is.

    Formulas and defaults are those of the authors' code (github.com/wuw2019/R-AMT, modules/masklayers.py,
    trainers/masktuning.py and the configuration of ViT-B/16), which masks the attention of CLIP's image encoder and
    uses Adam with the learning rate 8e-5. Its gradient dropout is `graft.fit(..., gradient_dropout=1)`.
    """

    papers = (
        Paper(
            "Regularized Mask Tuning: Uncovering Hidden Knowledge in Pre-trained Vision-Language Models",
            "Zheng et al.",
            2023,
            "https://arxiv.org/abs/2307.15049",
        ),
    )
    known = (
        "Its authors report 18.73 % more than zero-shot CLIP with 2.56 % of its parameters masked on average, better "
        "results than earlier methods on 11 data sets, and gains on top of other methods."
    )
    targets = "attention"

    def __init__(
        self,
        site,
        *,
        start: Annotated[float, "first value of the scores", Range(above=0)] = 1e-2,
        threshold: Annotated[float, "score above which an entry stays", Range(above=0)] = 5e-3,
        strength: Annotated[float, "weight of the penalty", Range(0)] = 1e-4,
    ):
        if start <= threshold:
            raise GraftError(f"r_amt: start must be above threshold = {threshold:g}, not {start:g}")
        super().__init__(site)
        self.s = nn.Parameter(torch.full((site.d_out, site.d_in), start))
        self.threshold, self.strength = threshold, strength

    def bits(self) -> Tensor:
        """The mask, see `pack`."""
        return pack(self.s.detach() > self.threshold)

    def forward(self, inner, x):
        w, b = inner.weight, self.bias(inner.bias)
        return self.site.apply_formed(x, _masked, w, b, self.s, self.bits(), pull=_gradients)

    def weight(self, w):
        return _masked(w, self.s, self.bits())

    @classmethod
    def penalty(cls, deltas):
        return deltas[0].strength * torch.stack([torch.linalg.vector_norm(d.s) for d in deltas]).sum()

    def packed(self):
        return {"bits": self.bits()}

    @classmethod
    def unpacked(cls, tensors, site, hyper):
        bits, start, threshold = tensors.get("bits"), hyper["start"], hyper["threshold"]
        shape = site.d_out, (site.d_in + 7) // 8
        if bits is None or len(tensors) > 1 or bits.shape != shape or bits.dtype != torch.uint8:
            raise GraftError(f"r_amt: {site.path} must have one tensor, bits {[*shape]} of bytes: another base?")
        return {"s": torch.where(unpack(bits, site.d_in), start, 2 * threshold - start)}


def pack(mask: Tensor) -> Tensor:
    """[out, in] of booleans as bytes [out, in / 8 rounded up]; the first of eight is the lowest bit."""
    padded = torch.nn.functional.pad(mask.to(torch.uint8), (0, -mask.shape[1] % 8)).unflatten(1, (-1, 8))
    return (padded << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(-1, dtype=torch.uint8)


def unpack(bits: Tensor, width: int) -> Tensor:
    """What `pack` packed, [out, width]."""
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits[..., None] >> places) & 1).flatten(-2)[..., :width].bool()


def _masked(w: Tensor, s: Tensor, bits: Tensor) -> Tensor:
    return w * (unpack(bits, w.shape[1]).to(w.dtype) + (s - s.detach()))


def _gradients(g, x, w, s, bits):
    return ((g.mT @ x) * w.to(g.dtype)).to(s.dtype), None
