"""SHiRA: Sparse High Rank Adapters. Bhardwaj et al., 2024."""

from typing import Annotated, Literal

import torch

from ...core import selection
from ...core.delta import Paper
from ...core.errors import GraftError
from ...core.formats.peft import OWN, As, Peft
from ...core.hyper import Range
from ...core.recipe import ByPath
from .entries import Entries


class _ShiraPeft(Peft):
    """PEFT keeps rows and columns, and r (in + out) entries of each matrix."""

    def site_out(self, delta):
        rows, columns = delta.index // delta.site.d_in, delta.index % delta.site.d_in
        return {"shira_weight": delta.value, "shira_indices": torch.stack([rows, columns]).int()}

    def site_in(self, site, found, config):
        state = super().site_in(site, found, config)
        rows, columns = state["index"].long()
        index, order = (rows * site.d_in + columns).sort()
        return {"value": state["value"][order], "index": index}

    def write_config(self, method, deltas, hyper):
        ranks = {len(d.value) / (d.site.d_in + d.site.d_out) for d in deltas.values()}
        if len(ranks) > 1 or any(rank % 1 for rank in ranks):
            raise GraftError(
                f"PEFT's SHiRA trains r (in + out) entries of each matrix with one whole r, which the density of this "
                f"adapter does not give: {OWN}"
            )
        return super().write_config(method, deltas, hyper) | {"r": int(ranks.pop()), "mask_type": "random"}

    def read_config(self, method, config, sites, found):
        hyper = super().read_config(method, config, sites, found)
        counts = {path: found[path]["shira_weight"].numel() for path in sites if "shira_weight" in found[path]}
        shares = {path: count / (sites[path].d_in * sites[path].d_out) for path, count in counts.items()}
        return hyper | {"density": ByPath(shares)}


class SHiRA(Entries, name="shira"):
    """W' = W + S: `density` of the entries of W [out, in] are trained, the others stay.

    `value` [k], zero at first, lies at the fixed flat positions `index` [k], k = density out in, in rising order,
    chosen by `mask`:

        random     any; they come from the adapter's seed, and are saved only if another file or a sum brought others
        magnitude  the largest |W|
        gradient   the largest |dL/dW| over the batches given to graft.collect
        snip       the largest |W dL/dW| over these batches
        structured the diagonal, and rows at even distances for the rest
    """

    papers = (Paper("Sparse High Rank Adapters", "Bhardwaj et al.", 2024, "https://arxiv.org/abs/2406.13175"),)
    known = (
        "Its authors report that 1 to 2 % of the weights do better than LoRA, that concepts are lost less when "
        "adapters are added up, and loading 5 to 16 times faster than merging LoRA on a CPU."
    )
    needs = ("weight_grad",)
    small = dict(density=0.2)
    peft = _ShiraPeft(
        "SHIRA",
        {"value": As("shira_weight"), "index": As("shira_indices")},
        neutral=frozenset({"r", "mask_type", "random_seed", "init_weights"}),
        own=frozenset({"density", "mask"}),
        hosts=("Linear",),
    )

    @classmethod
    def asks(cls, hyper):
        return () if hyper["mask"] == "structured" else selection.needs(hyper["mask"])

    def __init__(
        self,
        site,
        *,
        density: Annotated[float, "share of the entries which are trained", Range(above=0, high=1)] = 0.01,
        mask: Annotated[
            Literal["random", "magnitude", "gradient", "snip", "structured"], "how the entries are chosen"
        ] = "random",
    ):
        keep = max(1, round(density * site.d_out * site.d_in))
        pick = lambda: selection.best(_scores(mask, keep, site), keep)
        super().__init__(site, pick, drawn=keep if mask == "random" else None)


def _scores(mask, keep, site):
    """A score for every entry; the best are kept."""
    if mask != "structured":
        return selection.scores(mask, site)
    out, width, device = site.d_out, site.d_in, site.where().device
    scores = torch.zeros(out, width, device=device)
    rows = torch.zeros(0, dtype=torch.long)
    for count in range(max(0, (keep - min(out, width)) // width), out + 1):
        rows = torch.linspace(0, out - 1, count).round().long()
        if len(rows) * width + int((torch.arange(min(out, width))[:, None] != rows).all(1).sum()) >= keep:
            break  # rows and the rest of the diagonal are enough
    scores[rows] = torch.linspace(1, 0.5, len(rows), device=device)[:, None]
    return scores.fill_diagonal_(2)
