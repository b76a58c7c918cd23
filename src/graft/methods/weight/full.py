"""Full fine-tuning of chosen modules, as a delta: the base stays as it is beside it."""

from ...core.delta import Delta, bare_copy


class Full(Delta, name="full"):
    """y' = m(x), m a trained copy of the host: any module, a new classifier head among them.

    Where the host owns a matrix W [out, in], this is W' = V with V trained from W. The base's own tensors keep
    their values, so that several adapters can each have a head of their own.
    """

    hosts = ("linear", "conv", "embedding", "norm", "module")
    targets = "head"

    def __init__(self, site):
        super().__init__(site)
        self.copy = bare_copy(site.module).requires_grad_(True)

    def forward(self, inner, *args, **kwargs):
        return self.copy(*args, **kwargs)

    def weight(self, w):
        return self._own().weight

    def bias(self, b):
        return self._own().bias

    def _own(self):
        return type(self.site)(self.site.path, self.copy)
