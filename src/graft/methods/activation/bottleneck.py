"""What bottleneck adapters share: A(z) = up(act(down(z))), beside a host or after it."""

import inspect

import torch.nn.functional as F
from torch import Tensor, nn

from ...core.delta import Edit
from ...core.site import kind_of, site_for


class Bottleneck(Edit):
    """A(z) = up(act(down(z))), down [size, width], up [width, size], both with a bias; dropout falls before `up`."""

    def __init__(self, site, size: int, activation: str, dropout: float = 0.0):
        super().__init__(site)
        self.down, self.up = nn.Linear(site.width, size), nn.Linear(size, site.width)
        self.activation, self.dropout = getattr(F, activation), dropout

    def prepare(self, inner):
        return self.down.weight, self.down.bias, self.up.weight, self.up.bias

    def branch(self, z: Tensor, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor) -> Tensor:
        h = self.activation(F.linear(z, down.to(z.dtype), down_bias.to(z.dtype)))
        h = F.dropout(h, self.dropout, self.training) if self.dropout else h
        return F.linear(h, up.to(z.dtype), up_bias.to(z.dtype))


class Serial(Bottleneck):
    """h' = h + A(h), h the output of the host: a sub-layer before its residual connection, or a whole block."""

    def edit(self, h, x, *prepared):
        return h + self.branch(h, *prepared)


class Parallel(Bottleneck):
    """h' = h + s A(x), x [..., width] the input of the host and h its output.

    Where one module maps the features of the MLP back and adds the residual (BERT's `output`, called with both), x
    is that residual and s A(x) is added to it, which is the same sum.
    """

    hosts = ("module",)
    targets = "mlp"

    def __init__(self, site, size: int, activation: str, scaling: float, dropout: float):
        super().__init__(site, size, activation, dropout)
        nn.init.kaiming_uniform_(self.down.weight, a=5**0.5)
        for tensor in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(tensor)
        self.scaling = scaling
        self.passes_x = not _adds_residual(site.module)

    @classmethod
    def places(cls, model, path, module):
        """The module that adds the residual, where the MLP is not one module and this is its last matrix."""
        parent = model.get_submodule(path.rpartition(".")[0])
        if kind_of(module) != "module" and _adds_residual(parent):
            return [(path.rpartition(".")[0], parent)]
        return [(path, module)]

    @classmethod
    def refuses(cls, site):
        kind = kind_of(site.module)
        own = site_for(site.path, site.module, (kind,))
        if kind not in ("module", "norm") and (kind != "linear" or own.d_in != own.d_out):
            return (
                f"it is a single {type(site.module).__name__}, and {cls.name} goes beside a whole MLP: "
                f"target the module that holds both matrices"
            )

    def forward(self, inner, *args, **kwargs):
        residual = args[1] if len(args) == 2 else kwargs.get("input_tensor")
        if residual is None:
            return super().forward(inner, *args, **kwargs)
        features = args[0] if args else kwargs["hidden_states"]
        extra = self.branch(residual, *self.prepared(inner, residual.dtype))
        return inner(features, residual + self.scaling * extra)

    def edit(self, h, x, *prepared):
        return h + self.scaling * self.branch(x, *prepared)


def _adds_residual(module: nn.Module) -> bool:
    return "input_tensor" in inspect.signature(type(module).forward).parameters
