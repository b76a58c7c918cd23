"""SHiRA: Sparse High Rank Adapters. Bhardwaj et al., 2024."""

from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from ...core.delta import Delta, Paper
from ...core.hyper import Range


class SHiRA(Delta, name="shira"):
    """W' = W + S: `density` of the entries of W [out, in] are trained, the others stay.

    `value` [k], zero at first, lies at the fixed flat positions `index` [k], k = density out in, chosen by `mask`:

        random     any
        magnitude  the largest |W|
        gradient   the largest |dL/dW| over the batches given to graft.collect
        snip       the largest |W dL/dW| over these batches
        structured the diagonal, and rows at even distances for the rest
    """

    papers = (Paper("Sparse High Rank Adapters", "Bhardwaj et al.", 2024, "https://arxiv.org/abs/2406.13175"),)
    needs = ("weight_grad",)
    small = dict(density=0.2)
    index: Tensor

    @classmethod
    def asks(cls, hyper):
        return cls.needs if hyper["mask"] in ("gradient", "snip") else ()

    def __init__(
        self,
        site,
        *,
        density: Annotated[float, "share of the entries which are trained", Range(above=0, high=1)] = 0.01,
        mask: Annotated[
            Literal["random", "magnitude", "gradient", "snip", "structured"], "how the entries are chosen"
        ] = "random",
    ):
        super().__init__(site)
        w = site.weight.detach()
        keep = max(1, round(density * w.numel()))
        self.register_buffer("index", _scores(mask, w, keep, site).flatten().topk(keep).indices.sort().values)
        self.value = nn.Parameter(torch.zeros(keep))

    def forward(self, inner, x):
        return self.site.apply_formed(x, _placed, inner.weight, self.bias(inner.bias), self.value, self.index)

    def weight(self, w):
        return _placed(w.to(torch.promote_types(w.dtype, self.value.dtype)), self.value, self.index)


def _placed(w, value, index):
    return w.reshape(-1).index_add(0, index, value).view(w.shape)


def _scores(mask, w, keep, site):
    """A score for every entry; the best are kept."""
    if mask == "random":
        return torch.rand(w.shape, device=w.device)
    if mask == "magnitude":
        return w.abs()
    if mask == "structured":
        out, width = w.shape
        diagonal = min(out, width)
        rows = torch.linspace(0, out - 1, max(1, min(out, -(-(keep - diagonal) // width))), device=w.device).round()
        scores = torch.zeros(out, width, device=w.device)
        scores[rows.long()] = torch.linspace(1, 0.5, len(rows), device=w.device)[:, None]
        return scores.fill_diagonal_(2)
    if site.saved is not None:
        return torch.zeros_like(w)  # the positions come from the file
    grad = site.stats["weight_grad"].to(w.dtype)
    return grad.abs() if mask == "gradient" else (w * grad).abs()
