"""Sites: what a delta may know of its host, and the linear maps it may apply there.

A host is any module. Hosts which own a matrix show it as [out, in], whatever their layout, so that a method written
once works on nn.Linear, GPT-2's Conv1D, convolutions, embeddings and quantised layers. A new kind of host is one more
class here, a new quantiser one more file under `quantised`; no method changes.

Precision: a delta keeps float32 tensors beside a half-precision base. Every map below computes in the dtype of its
input and casts the delta's small tensors to it, so that no activation is kept twice for backward.
"""

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import ParametrizationList

from .delta import base_modules
from .errors import GraftError

KINDS: dict[str, type["Site"]] = {}  # qualified name of a class of modules, or of their weights -> site


def _qualified(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _host_class(module: nn.Module) -> type:
    """The class of a module without the deltas it may carry."""
    return getattr(module, "host_class", type(module))


def _is_norm(module: nn.Module) -> bool:
    own = dict(module.named_parameters(recurse=False))
    vectors = all(p.dim() == 1 for p in own.values())
    leaf = all(getattr(m, "graft_owned", False) for m in module.children())
    return "weight" in own and vectors and leaf and "norm" in type(module).__name__.lower()


def _is_fused(module: nn.Module) -> bool:
    """Several matrices in one parameter, unlike a class token [1, 1, d] or a transposed convolution."""
    stacked = any(p is not None and p.dim() == 3 and len(p) > 1 for p in module._parameters.values())
    return stacked and not isinstance(module, (_ConvNd, ParametrizationList))


def _site_class(module: nn.Module) -> type["Site"]:
    own, classes = module._parameters.get("weight"), _host_class(module).__mro__
    if own is not None and type(own) is not nn.Parameter and isinstance(module, nn.Linear):
        classes = (*type(own).__mro__, *classes)
    for cls in classes:
        if found := KINDS.get(_qualified(cls)):
            return found
    if _is_norm(module):
        return NormSite
    return FusedSite if _is_fused(module) else Site


def is_quantised(module: nn.Module) -> bool:
    return issubclass(_site_class(module), QuantisedSite)


def kind_of(module: nn.Module) -> str:
    """linear, conv, embedding, norm, fused (matrices stacked in one 3-d parameter), or module (anything else)."""
    return _site_class(module).kind


def site_for(path: str, module: nn.Module, hosts: tuple[str, ...] = ("module",), **position) -> "Site":
    """The site of `module` for a method that works on the kinds `hosts`."""
    if "model" in hosts:
        return ModelSite(path, module, **position)
    if "attention" in hosts:
        from .attention import AttentionSite

        return AttentionSite(path, module, **position)
    cls = _site_class(module)
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

    def __init_subclass__(cls, hosts: tuple = (), **kwargs):
        super().__init_subclass__(**kwargs)
        KINDS.update({host if isinstance(host, str) else _qualified(host): cls for host in hosts})

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

    weight: Any = property(_no_matrix)
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


class FusedSite(Site):
    """Matrices of several experts kept as one 3-d parameter: no single matrix to adapt."""

    kind = "fused"


class LinearSite(Site, hosts=(nn.Linear,)):
    """y = x W^T + b over the last axis, W [out, in]."""

    kind = "linear"
    taps = 1  # positions of a kernel: d_in counts each input channel this many times
    d_out = width = property(lambda self: self.module.weight.shape[0])
    d_in = property(lambda self: self.module.weight.shape[1])
    inputs = property(lambda self: self.d_in)  # channels of the input, which in a convolution are fewer than columns
    weight = property(lambda self: self.module.weight)

    def __init__(self, path, module, **position):
        super().__init__(path, module, **position)
        own = module._parameters.get("weight")
        if own is None or isinstance(self, QuantisedSite):
            return
        if own.dtype.itemsize == 1 or any(_qualified(c) in KINDS for c in type(own).__mro__):
            raise GraftError(
                f"{path} ({_host_class(module).__name__}) keeps its weight as codes of type {own.dtype}, which cannot "
                f"be decoded here: choose other modules, or quantise with torch, torchao or bitsandbytes"
            )

    def where(self):
        return self.module.weight

    def apply(self, x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
        """The host's own map with the matrix w [out, in] in place of W."""
        return F.linear(x, _as(x, w), bias if bias is None else _as(x, bias))

    def apply_formed(
        self,
        x: Tensor,
        form: Callable,
        w: Tensor,
        bias: Tensor | None,
        *tensors: Tensor,
        pull: Callable | None = None,
    ) -> Tensor:
        """apply(x, form(w, *tensors), bias) that keeps x, w and `tensors` for backward and forms W' again there.

        `form` is pure, and what it computes with besides its arguments is no tensor. It gets them in x's dtype.
        Where W is frozen, `pull(g, x, w, *tensors)` returns the gradients of `tensors` from g = dL/dy [n, out] and
        x [n, in], for methods that do so with less than dL/dW' = g^T x [out, in] and the derivative of `form`.
        """
        return _Formed.apply(form, pull, x, w, bias, *tensors)  # type: ignore[return-value]

    def plain_in(self, x: Tensor) -> bool:
        """Whether x meets the matrix itself in a product, both in single precision or more."""
        return x.dtype == self.where().dtype and x.dtype.itemsize >= 4 and not torch.is_autocast_enabled(x.device.type)

    def down(self, x: Tensor, a: Tensor) -> Tensor:
        """k features of the input: the host's map with the matrix a [k, in]."""
        return _thin(x, a)

    def up(self, h: Tensor, b: Tensor) -> Tensor:
        """The matrix b [out, k] on the k features of h."""
        return _thin(h, b)

    def add_up(self, y: Tensor, h: Tensor, b: Tensor) -> Tensor:
        """y + up(h, b)."""
        if self.kind != "linear" or (y.dim() > 1 and y.shape[-2] == 1):  # of one token the views cost more
            return y + self.up(h, b)
        # One pass over y; adding a finished product would take three.
        out = torch.addmm(y.reshape(-1, len(b)), _as(y, h.reshape(-1, b.shape[1])), _as(y, b.T))
        return out.view(y.shape)

    def kron(self, x: Tensor, left: Tensor, right: tuple[Tensor, ...]) -> Tensor:
        """The host's map with the matrix left ⊗ (... right[1] right[0]), which is never formed.

        left is [a, c] and the product of `right` [b, d], for a host with a b outputs and c d inputs.
        """
        first, *rest = (m.to(x.dtype) for m in right)
        h = F.linear(x.unflatten(-1, (left.shape[1], -1)), first)  # [..., c, k]
        h = F.linear(h.transpose(-1, -2), left.to(x.dtype)).transpose(-1, -2)  # [..., a, k]
        for m in rest:
            h = F.linear(h, m)
        return h.flatten(-2)

    def scale(self, h: Tensor, v: Tensor | float) -> Tensor:
        """The channels of an output or of features h times the vector v."""
        return h * (v if isinstance(v, float | int) else self._shape(v.to(h.dtype), h))

    def shift(self, h: Tensor, v: Tensor) -> Tensor:
        """The channels of an output or of features h plus the vector v."""
        return h + self._shape(v.to(h.dtype), h)

    def rescale(self, y: Tensor, gain: Tensor, bias: Tensor | None = None) -> Tensor:
        """The channels of y - bias times 1 + gain, plus bias; nothing of the size of y is kept but the result."""
        gain, bias = self._shape(gain, y), None if bias is None else self._shape(_as(y, bias), y)
        return _Rescale.apply(y, gain, bias) if torch.is_grad_enabled() else _rescaled(y, gain, bias)

    def _shape(self, v: Tensor, h: Tensor) -> Tensor:
        return v

    def rows(self, v: Tensor) -> Tensor:
        """The vector v [out] shaped to multiply the rows of the matrix: scale(f(x), v) = f(x) with rows(v) * W."""
        return v[:, None]

    def columns(self, v: Tensor) -> Tensor:
        """The vector v [inputs] shaped to multiply the columns of the matrix: f(scale(x, v)) = f(x), columns(v) * W."""
        return v

    def layout(self, w: Tensor, b: Tensor | None) -> dict[str, Tensor]:
        """The tensors of a checkpoint for the matrix w [out, in] and bias b."""
        return {"weight": w} if b is None else {"weight": w, "bias": b}


def _rescaled(y: Tensor, gain: Tensor, b: Tensor | None) -> Tensor:
    return torch.addcmul(y, y if b is None else y - b, _as(y, gain))


class _Rescale(torch.autograd.Function):
    """z = y + gain (y - b): the gradient of the gain follows from z, which the next operation often keeps anyway.

    dL/dgain = sum dL/dz (y - b) = sum dL/dz (z - b) / (1 + gain); taken to be zero where 1 + gain is.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(y, gain, b):
        return _rescaled(y, gain, b)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output, *inputs[1:])

    @staticmethod
    def backward(ctx, *grads):
        z, gain, b = ctx.saved_tensors
        free, factor = z if b is None else z - b, 1 + gain
        share = (grads[0] * free).sum_to_size(gain.shape) / factor
        to_y = torch.addcmul(grads[0], grads[0], gain.to(z.dtype))
        to_b = (grads[0] - to_y).sum_to_size(b.shape) if b is not None and ctx.needs_input_grad[2] else None
        return to_y, torch.where(factor == 0, 0, share), to_b


class Conv1DSite(LinearSite, hosts=("transformers.pytorch_utils.Conv1D",)):
    """GPT-2's layer keeps W as [in, out]."""

    d_out = width = property(lambda self: self.module.weight.shape[1])
    d_in = property(lambda self: self.module.weight.shape[0])
    weight = property(lambda self: self.module.weight.T)

    def layout(self, w, b):
        return super().layout(w.T.contiguous(), b)


class EmbeddingSite(LinearSite, hosts=(nn.Embedding,)):
    """y = W[:, token], a linear map of one-hot inputs: W is [dim, vocabulary]. Some models scale the output."""

    kind = "embedding"
    d_out = width = property(lambda self: self.module.weight.shape[1])
    d_in = property(lambda self: self.module.weight.shape[0])
    weight = property(lambda self: self.module.weight.T)
    bias = None

    def apply(self, x, w, bias=None):
        return self.down(x, w)

    def apply_formed(self, x, form, w, bias, *tensors, pull=None):
        return self.apply(x, form(w, *_to(w.dtype, tensors)), bias)  # a look-up keeps no matrix

    def down(self, x, a):
        h = F.embedding(x, a.T).to(self.module.weight.dtype)
        scale = getattr(self.module, "embed_scale", None)
        return h if scale is None else h * torch.as_tensor(scale, dtype=h.dtype, device=h.device)

    def kron(self, x, left, right):  # column t of P ⊗ Q is column t // d of P ⊗ column t % d of Q
        first, *rest = right
        h = F.embedding(x % first.shape[1], first.T)
        for m in rest:
            h = F.linear(h, m)
        p = self.down(x // first.shape[1], left)
        return (p.unsqueeze(-1) * h.to(p.dtype).unsqueeze(-2)).flatten(-2)

    def layout(self, w, b):
        return {"weight": w.T.contiguous()}


class ConvSite(LinearSite, hosts=(nn.Conv1d, nn.Conv2d, nn.Conv3d)):
    """A convolution is a linear map of patches: W is [out, in / groups * kernel]."""

    kind = "conv"
    taps = property(lambda self: math.prod(self.module.kernel_size))
    d_in = property(lambda self: self.module.weight[0].numel())
    inputs = property(lambda self: self.module.in_channels)
    weight = property(lambda self: self.module.weight.flatten(1))

    def apply(self, x, w, bias=None):
        kernel = w.reshape(w.shape[0], -1, *self.module.kernel_size).to(x.dtype)
        return self.module._conv_forward(x, kernel, bias if bias is None else bias.to(x.dtype))

    def apply_formed(self, x, form, w, bias, *tensors, pull=None):
        return self.apply(x, form(w.to(x.dtype), *_to(x.dtype, tensors)), bias)

    def down(self, x, a):  # each group sees all k filters: [groups * k] features
        return self.apply(x, a.repeat(self.module.groups, 1) if self.module.groups > 1 else a)

    def up(self, h, b):
        conv = (F.conv1d, F.conv2d, F.conv3d)[self.module.weight.dim() - 3]
        kernel = b.view(*b.shape, *[1] * (self.module.weight.dim() - 2)).to(h.dtype)
        return conv(h, kernel, groups=self.module.groups)

    def kron(self, x, left, right):
        first, *rest = right
        if self.module.groups > 1:  # the blocks of P ⊗ Q are not those of the groups
            for m in rest:
                first = m @ first
            return self.apply(x, torch.kron(left, first))
        a, c = left.shape
        axes = self.module.weight.dim() - 1  # channels and space
        h = x.reshape(-1, x.shape[-axes] // c, *x.shape[1 - axes :])  # [batch c, d, ...]
        h = self.apply(h, first).unflatten(0, (-1, c))
        h = torch.einsum("ac,nc...->na...", left.to(x.dtype), h).flatten(0, 1)
        for m in rest:
            h = self.up(h, m)
        return h.reshape(*x.shape[:-axes], a * h.shape[1], *h.shape[2:])

    def _shape(self, v, h):
        channels = h.shape[1 - self.module.weight.dim()]
        if channels != len(v):
            v = v.repeat(channels // len(v))
        return v.view(-1, *[1] * (self.module.weight.dim() - 2))

    def columns(self, v):
        own = self.module.weight
        of_group = v.view(self.module.groups, -1).repeat_interleave(own.shape[0] // self.module.groups, 0)
        return of_group.repeat_interleave(own[0, 0].numel(), 1)

    def layout(self, w, b):
        return super().layout(w.reshape(self.module.weight.shape), b)


class NormSite(LinearSite):
    """y = n(x) g + b per channel: `weight` is the gain g [d] in effect, also where the module keeps g - 1 (Gemma)."""

    kind = "norm"
    d_out = d_in = width = property(lambda self: len(self.module.weight))

    def __init__(self, path, module, **position):
        super().__init__(path, module, **position)
        if isinstance(module, nn.GroupNorm | nn.modules.batchnorm._NormBase):
            self.offset, self.axis = 0.0, 1
        elif _host_class(module).__module__.startswith("torch.nn"):
            self.offset, self.axis = 0.0, -1
        else:
            self.offset, self.axis = self._probe()

    @torch.no_grad()
    def _probe(self) -> tuple[float, int]:
        """What a module of unknown make does, seen by running it with a weight of zero.

        The first is 1 where it computes n(x) (1 + weight), else 0; the second is the axis of its channels.
        """
        own = self.module.weight
        x = torch.linspace(-1, 1, own.numel(), dtype=own.dtype, device=own.device)
        zero = {k: torch.zeros_like(v) for k, v in self.module.named_parameters(recurse=False)}
        for axis, shape in ((-1, (1, -1)), (1, (1, -1, 1, 1)), (1, (1, -1, 1))):
            try:
                return float(bool(self._call(zero, x.view(shape)).abs().sum() > 0)), axis
            except (RuntimeError, IndexError, ValueError):
                continue
        raise GraftError(f"{self.path}: {type(self.module).__name__} is no norm that can be run on features alone")

    def _call(self, tensors, x):
        bound = _Bound(self.module, _host_class(self.module).forward)
        return functional_call(bound, {f"module.{k}": v for k, v in tensors.items()}, x)

    @property
    def weight(self):
        return self.module.weight + self.offset if self.offset else self.module.weight

    def apply(self, x, w, bias=None):
        own = self.module.weight.dtype
        if _host_class(self.module) is nn.LayerNorm:
            bias = bias if bias is None else bias.to(own)
            return F.layer_norm(x, self.module.normalized_shape, w.to(own), bias, self.module.eps)
        return self._call({k: v.to(own) for k, v in self.layout(w, bias).items()}, x)

    def rows(self, v):
        return v

    def layout(self, w, b):
        return super().layout(w - self.offset if self.offset else w, b)

    def _shape(self, v, h):
        return v if self.axis < 0 else v.view(-1, *[1] * (h.dim() - 2))


def _as(x: Tensor, t: Tensor) -> Tensor:
    """t in the dtype of x; Tensor.to takes its time to find that nothing is to be done."""
    return t if t.dtype == x.dtype else t.to(x.dtype)


def _thin(x: Tensor, m: Tensor) -> Tensor:
    """x m^T in the dtype of x, for a matrix m with a short side."""
    dtype = small_product(x, m)
    if dtype == x.dtype:
        return F.linear(x, _as(x, m))
    return F.linear(x.to(dtype), m).to(x.dtype)


def small_product(x: Tensor, m: Tensor) -> torch.dtype:
    """The dtype in which to multiply x with the small tensor m: that of x, but for one token on a CPU.

    There a product in half precision takes longer to begin than all of it takes in the float32 of m, uncast.
    """
    few = x.device.type == "cpu" and x.dim() > 1 and x.shape[-2] == 1
    return m.dtype if few and m.dtype.itemsize > x.dtype.itemsize else x.dtype


def _to(dtype: torch.dtype, tensors: Iterable[Tensor]) -> list[Tensor]:
    return [t.to(dtype) if t.is_floating_point() else t for t in tensors]


def _lines(t: Tensor) -> Tensor:
    """[..., features] as [tokens, features]."""
    return t.reshape(-1, t.shape[-1])


class _Formed(torch.autograd.Function):
    """x W'^T + b with W' = form(w, *tensors), which is formed twice instead of kept."""

    generate_vmap_rule = True

    @staticmethod
    def forward(form, pull, x, w, bias, *tensors):
        w, *tensors = _to(x.dtype, (w, *tensors))
        return F.linear(x, form(w, *tensors), bias if bias is None else bias.to(x.dtype))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.form, ctx.pull, x, w, bias, *tensors = inputs
        ctx.save_for_backward(x, w, bias, *tensors)

    @staticmethod
    def backward(ctx, *grads):
        g = grads[0]
        x, w, bias, *tensors = ctx.saved_tensors
        need_x, need_w, need_bias, *need = ctx.needs_input_grad[2:]
        given = [w, *tensors]
        moving = [i for i, needed in enumerate([need_w, *need]) if needed]

        def formed(*values):
            now = dict(zip(moving, values))
            return ctx.form(*_to(x.dtype, (now.get(i, t) for i, t in enumerate(given))))

        found = {}
        if moving and (need_w or not ctx.pull):
            matrix, pull = torch.func.vjp(formed, *(given[i] for i in moving))[:2]
            dw = _lines(g).mT @ _lines(x).to(g.dtype)
            found = dict(zip(moving, pull(dw.to(matrix.dtype))))
        else:
            if moving:  # before W' is there, so that what it takes on the way is not beside it
                found = dict(enumerate(ctx.pull(_lines(g), _lines(x).to(g.dtype), *given), 1))
            matrix = formed() if need_x else w
        dx = (g @ matrix.to(g.dtype)).to(x.dtype) if need_x else None
        db = _lines(g).sum(0).to(bias.dtype) if need_bias else None
        return None, None, dx, found.get(0), db, *(found.get(i + 1) for i in range(len(tensors)))


class _Bound(nn.Module):
    """Calls `forward` of the class of `module`, past the deltas mounted there."""

    call: Any

    def __init__(self, module, forward):
        super().__init__()
        self.module = module
        object.__setattr__(self, "call", forward)

    def forward(self, x):
        return self.call(self.module, x)


class QuantisedSite(LinearSite):
    """A linear map whose weight is kept as codes: `inner(x)` runs on them, and only weight paths decode them.

    Subclass it once per quantiser, in one file under `quantised`; `decode` is all that it must write.
    """

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
            f"{self.path} is quantised ({_host_class(self.module).__name__}), and codes cannot take a change: "
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
        return _host_class(module).forward(module, x) if self.own is None else self.own(x)


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
    return [cls(path, m) for path, m in base_modules(model).items() if issubclass(cls := _site_class(m), QuantisedSite)]


def tucker_form(core: Tensor, a: Tensor) -> Tensor:
    """[k, in * kernel]: the features a [k, in] of every position, then mixed by the core [k, k, kernel ...]."""
    return torch.einsum("ij...,jr->ir...", core, a).flatten(1)


def rounding_loss(exact: Tensor, before: Tensor, dtype: torch.dtype) -> float:
    """The share of the change exact - before that storing it as `dtype` loses: ||round(W') - W'|| / ||W' - W||."""
    if exact.dtype == dtype:
        return 0.0
    change = torch.linalg.vector_norm(exact - before).item()
    lost = torch.linalg.vector_norm(exact.to(dtype) - exact).item()
    return lost / change if change and math.isfinite(change) else 0.0


from . import quantised  # noqa: E402

quantised.load()
