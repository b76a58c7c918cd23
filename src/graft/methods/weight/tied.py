"""Factors that sites of one size share, for methods that tie layers."""

from typing import Any

import torch
from torch import nn

from ...core.errors import GraftError


class Tied(nn.Module):
    """A [rank, in] and B [out, rank] for each size [out, in] of the `sites`."""

    def __init__(self, sites: list, rank: int, fill_A: Any, fill_B: Any, train: str = "AB"):
        """Those of A and B that are not in `train` are not saved, but drawn again from the adapter's seed."""
        super().__init__()
        self.rank, self.trained, ups = rank, "".join(n for n in "AB" if n in train), []
        for site in sites:
            for name, shape, fill in (("A", (rank, site.d_in), fill_A), ("B", (site.d_out, rank), fill_B)):
                key = self.key(name, site)
                if hasattr(self, key):
                    continue
                value = fill(torch.empty(shape))
                if name in train:
                    self.register_parameter(key, nn.Parameter(value))
                    ups += [key] * (name == "B")
                else:
                    self.register_buffer(key, value, persistent=False)
        self.ups = tuple(ups)

    @staticmethod
    def key(name: str, site: Any) -> str:
        return f"{name}_{site.d_out}x{site.d_in}"

    def at(self, site: Any, method: str, rank: int) -> None:
        """Refuse a rank of its own at one of the sites."""
        if rank != self.rank:
            raise GraftError(
                f"{method}: rank must be the same at all sites, which share factors; {site.path} asks for {rank}, the "
                f"first one for {self.rank}"
            )

    def of(self, site: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B of a site."""
        return getattr(self, self.key("A", site)), getattr(self, self.key("B", site))
