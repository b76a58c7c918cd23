"""Full fine-tuning of chosen modules, as a delta: the base stays as it is beside it."""

import copy
from typing import Any

from torch.func import functional_call

from ...core.delta import Delta, bare_copy
from ...core.site import QuantisedSite


class Full(Delta, name="full"):
    """y' = m(x), m a trained copy of the host: any module, a new classifier head among them.

    Where the host owns a matrix W [out, in], this is W' = V with V trained from W. The base's own tensors keep
    their values, so that several adapters can each have a head of their own. Deltas further inside (of adapters
    attached before, or on modules inside the host) rest while it runs; deltas outside act on its result.
    """

    hosts = ("linear", "conv", "embedding", "norm", "module")
    targets = "head"

    copy: Any

    def __init__(self, site):
        super().__init__(site)
        self.copy = bare_copy(site.module).requires_grad_(True)

    @classmethod
    def refuses(cls, site):
        return "its weight is quantised" if isinstance(site, QuantisedSite) else None

    def forward(self, inner, *args, **kwargs):
        if self.site.kind != "module":
            return super().forward(inner, *args, **kwargs)
        # The copy keeps float32 beside a half-precision base, and computes in the precision of the base.
        wanted = self.site.where().dtype
        cast = {n: p.to(wanted) for n, p in self.copy.named_parameters() if p.dtype != wanted}
        return functional_call(self.copy, cast, args, kwargs) if cast else self.copy(*args, **kwargs)

    def weight(self, w):
        return self._own().weight

    def bias(self, b):
        return self._own().bias

    def tensors(self, inner):
        return dict(self.copy.named_parameters(remove_duplicate=False))

    def _own(self):
        own = copy.copy(self.site)
        own.module = self.copy
        return own
