"""What bottleneck adapters share: A(z) = up(act(down(z))), beside a host or after it."""

import inspect

import torch.nn.functional as F
from torch import Tensor, nn

from ...core.delta import Edit
from ...core.site import kind_of


class Bottleneck(Edit):
    """A(z) = up(act(down(z))), down [size, width], up [width, size], both with a bias; dropout falls before `up`."""

    def __init__(self, site, size: int, activation: str, dropout: float = 0.0):
        super().__init__(site)
        self.down, self.up = nn.Linear(site.width, size), nn.Linear(size, site.width)
        self.activation, self.dropout = getattr(F, activation), dropout

    def branch(self, z: Tensor) -> Tensor:
        h = self.activation(_apply(self.down, z))
        return _apply(self.up, F.dropout(h, self.dropout, self.training) if self.dropout else h)


class Serial(Bottleneck):
    """h' = h + A(h), h the output of the host: a sub-layer before its residual connection, or a whole block."""

    def edit(self, h, x):
        return h + self.branch(h)


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
        self.passes_x = "input_tensor" not in inspect.signature(type(site.module).forward).parameters

    @classmethod
    def places(cls, model, path, module):
        """The module that adds the residual, where the MLP is not one module and this is its last matrix."""
        parent = model.get_submodule(path.rpartition(".")[0])
        if kind_of(module) != "module" and "input_tensor" in inspect.signature(type(parent).forward).parameters:
            return [(path.rpartition(".")[0], parent)]
        return [(path, module)]

    @classmethod
    def refuses(cls, site):
        shape = getattr(site.module, "weight", site.where()).shape
        if kind_of(site.module) != "module" and shape[0] != shape[-1]:
            return (
                f"it is a single {type(site.module).__name__}, and {cls.name} goes beside a whole MLP: "
                f"target the module that holds both matrices"
            )

    def forward(self, inner, *args, **kwargs):
        residual = args[1] if len(args) == 2 else kwargs.get("input_tensor")
        if residual is None:
            return super().forward(inner, *args, **kwargs)
        features = args[0] if args else kwargs["hidden_states"]
        return inner(features, residual + self.scaling * self.branch(residual))

    def edit(self, h, x):
        return h + self.scaling * self.branch(x)


def _apply(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))
