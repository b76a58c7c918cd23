"""Sites: what a delta may know of its host, and how the kind of a module is told.

A host is any module. Hosts which own a matrix show it as [out, in], whatever their layout, so that a method written
once works on nn.Linear, GPT-2's Conv1D, convolutions, embeddings and quantised layers. A new kind of host is one more
file under `sites`, a new quantiser one more under `quantised`; no method changes.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import ParametrizationList

from .errors import GraftError
from .host import base_modules
from .loading import load_all

KINDS: dict[str, type["Site"]] = {}  # qualified name of a class of modules, or of their weights -> site
BY_LOOKS: list[tuple[Callable[[nn.Module], bool], type["Site"]]] = []  # for modules of classes without a name above


def qualified(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def host_class(module: nn.Module) -> type:
    """The class of a module without the deltas it may carry."""
    return getattr(module, "host_class", type(module))


def site_class(module: nn.Module) -> type["Site"]:
    """Of the sites of a module; kinds of hosts are imported when the first one is asked for."""
    for kinds in ("sites", "quantised"):
        load_all(f"{__package__}.{kinds}")
    own, classes = module._parameters.get("weight"), host_class(module).__mro__
    if own is not None and type(own) is not nn.Parameter and isinstance(module, nn.Linear):
        classes = (*type(own).__mro__, *classes)
    for cls in classes:
        if found := KINDS.get(qualified(cls)):
            return found
    return next((cls for fits, cls in BY_LOOKS if fits(module)), Site)


def is_quantised(module: nn.Module) -> bool:
    return site_class(module).coded


def kind_of(module: nn.Module) -> str:
    """linear, conv, embedding, norm, fused (matrices stacked in one 3-d parameter), or module (anything else)."""
    return site_class(module).kind


def site_for(path: str, module: nn.Module, hosts: tuple[str, ...] = ("module",), **position) -> "Site":
    """The site of `module` for a method that works on the kinds `hosts`."""
    if "model" in hosts:
        return ModelSite(path, module, **position)
    if "attention" in hosts:
        from .attention import AttentionSite

        return AttentionSite(path, module, **position)
    cls = site_class(module)
    if cls.kind not in hosts and "module" in hosts and cls.kind != "fused":
        cls = Site
    return cls(path, module, **position)


class Site:
    """Module `module` at `path`, number `index` of the `count` chosen ones.

    `stats` is what the method needs while it builds a delta. `saved` is None for a new delta; for one that comes from
    a file it holds its tensors by name: their values are copied in afterwards, so the constructor has no statistics,
    may spare whatever only finds initial values, and draws no random numbers where all its tensors are in the file.
    Sizes that no hyperparameter tells are those of `saved`.

    A `head` is trained whole beside a method; nothing follows it, so it may have outputs of its own number.
    """

    kind = "module"
    coded = False  # whether the host keeps its matrix as codes
    module: Any

    def __init__(
        self,
        path: str,
        module: nn.Module,
        index: int = 0,
        count: int = 1,
        stats: dict | None = None,
        saved: dict[str, Tensor] | None = None,
        head: bool = False,
    ):
        self.path, self.module, self.index, self.count = path, module, index, count
        self.stats, self.saved, self.head = stats or {}, saved, head

    def __init_subclass__(cls, hosts: tuple = (), looks: Callable[[nn.Module], bool] | None = None, **kwargs):
        super().__init_subclass__(**kwargs)
        KINDS.update({host if isinstance(host, str) else qualified(host): cls for host in hosts})
        if looks is not None:
            BY_LOOKS.append((looks, cls))

    def within(self, name: str) -> "Site":
        """This site for a delta that is the part `name` of another one: of the file it sees its own tensors."""
        part = copy.copy(self)
        if self.saved is not None:
            part.saved = {k.removeprefix(f"{name}."): v for k, v in self.saved.items() if k.startswith(f"{name}.")}
        return part

    def where(self) -> Tensor:
        """A tensor with the device and dtype in which the host computes."""
        for tensor in (*self.module.parameters(), *self.module.buffers()):
            if tensor.is_floating_point():
                return tensor
        return torch.empty(0)

    @property
    def width(self) -> int:
        """Number of output features: as observed (statistics), else that of the last matrix (or norm) inside."""
        if seen := self.stats.get("width"):
            return seen
        inside = base_modules(self.module).values()
        for kinds in ("linear", "conv"), ("norm",):
            if found := [m for m in inside if kind_of(m) in kinds]:
                return site_for("", found[-1], kinds).d_out
        raise GraftError(f"{self.path}: the size of its output cannot be told; collect the statistic 'width' first")

    def relinked(self, deltas: list) -> None:
        """Called when the deltas that run at the host change."""

    def _no_matrix(self) -> Any:
        raise GraftError(
            f"{self.path or 'the model'} is a {type(self.module).__name__}, which owns no matrix: "
            f"choose Linear, Conv1D, Conv2d or Embedding modules for a weight delta"
        )

    @property
    def weight(self) -> Any:
        """The matrix [out, in] of a host that has one, also where a method takes the host for any module."""
        cls = site_class(self.module)
        return self._no_matrix() if cls.weight is Site.weight else cls(self.path, self.module).weight

    d_in: Any = property(_no_matrix)
    d_out: Any = property(_no_matrix)

    bias: Any = property(lambda self: getattr(self.module, "bias", None))

    @property
    def weight_now(self) -> Tensor:
        """The matrix with which the host computes at present, the deltas that run there included."""
        return self.module.chain.weight if hasattr(self.module, "host_class") else self.weight


class ModelSite(Site):
    """A model: the whole one, path "", for changes of logits, or the backbone in it, for prompts."""

    kind = "model"


def _is_fused(module: nn.Module) -> bool:
    """Several matrices in one parameter, unlike a class token [1, 1, d] or a transposed convolution."""
    stacked = any(p is not None and p.dim() == 3 and len(p) > 1 for p in module._parameters.values())
    return stacked and not isinstance(module, (_ConvNd, ParametrizationList))


class FusedSite(Site, looks=_is_fused):
    """Matrices of several experts kept as one 3-d parameter: no single matrix to adapt."""

    kind = "fused"
