"""Linear layers whose weight is kept as codes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import GraftError
from ..host import base_modules
from ..site import host_class, site_class
from .linear import LinearSite


class QuantisedSite(LinearSite):
    """A linear map whose weight is kept as codes: `inner(x)` runs on them, and only weight paths decode them.

    Subclass it once per quantiser, in one file under `quantised`; `decode` is all that it must write.
    """

    coded = True
    d_out = width = property(lambda self: self.module.out_features)
    d_in = property(lambda self: self.module.in_features)
    weight = property(lambda self: self.decode())
    passes_gradient: Any = True  # whether backward of the module itself reaches x
    dtype: torch.dtype | None = None  # of x and y, where the module computes in one alone

    def decode(self) -> Tensor:
        """The matrix [out, in] with which the module computes."""
        raise NotImplementedError

    def plain_in(self, x):
        return False

    def codes(self) -> dict[str, Tensor]:
        """What the weight is decoded from, and the bias: plain tensors by name."""
        return dict(self.module.named_parameters(recurse=False)) | dict(self.module.named_buffers(recurse=False))

    def open(self) -> None:
        """Called before the first adapter comes to the model, whether or not it adapts this module."""
        if not self.passes_gradient:
            self.module.__dict__["forward"] = _Through(self, self.module.__dict__.get("forward"))

    def close(self) -> None:
        """Undo what `open` did, after the last adapter has left."""
        through = self.module.__dict__.get("forward")
        if isinstance(through, _Through):
            del self.module.__dict__["forward"]
            if through.own is not None:
                self.module.__dict__["forward"] = through.own

    def where(self):
        own = self.codes().values()
        found = next((t for t in own if t.is_floating_point()), None)
        if found is None or self.dtype is not None:
            return next((t.new_empty(0, dtype=self.dtype or torch.float32) for t in own), torch.empty(0))
        return found

    def layout(self, w, b):
        raise GraftError(
            f"{self.path} is quantised ({host_class(self.module).__name__}), and codes cannot take a change: "
            f"graft.dequantise(model) gives it a plain weight to merge into"
        )


class _Through:
    """The forward of a module whose own one ends the graph of autograd: dL/dx = dL/dy W, decoded for backward."""

    def __init__(self, site: QuantisedSite, own: Callable | None):
        self.site, self.own = site, own

    def __call__(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            return _PassedOn.apply(self, x)  # type: ignore[return-value]
        return self.run(x)

    def run(self, x: Tensor) -> Tensor:
        module = self.site.module
        return host_class(module).forward(module, x) if self.own is None else self.own(x)


class _PassedOn(torch.autograd.Function):
    @staticmethod
    def forward(through, x):
        return through.run(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.site = inputs[0].site

    @staticmethod
    def backward(ctx, *grads):
        return None, grads[0] @ ctx.site.decode().to(grads[0].dtype)


def quantised_sites(model: nn.Module) -> list[QuantisedSite]:
    found = ((path, m, site_class(m)) for path, m in base_modules(model).items())
    return [cls(path, m) for path, m, cls in found if issubclass(cls, QuantisedSite)]
