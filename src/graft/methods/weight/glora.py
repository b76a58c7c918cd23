"""GLoRA: One-for-All: Generalized LoRA for Parameter-Efficient Fine-tuning. Chavan et al., 2023."""

import functools
from typing import Annotated, Literal

import torch
from torch import nn

from ...core.delta import Delta, Paper
from ...core.errors import GraftError
from ...core.formats.peft import OWN, As, Peft
from ...core.hyper import Range

Kind = Literal["lora", "vector", "constant", "none"]


class _GloraPeft(Peft):
    """PEFT has one kind for A and B and one for D and E, and saves the zeros of a tensor which is not there."""

    def site_in(self, site, found, config):
        return super().site_in(site, {name: t for name, t in found.items() if not name.endswith(".zeros")}, config)

    def write_config(self, method, deltas, hyper):
        for one, other in ("ab", "de"):
            if any(h[one] != h[other] for h in hyper.values()):
                raise GraftError(f"PEFT's GLoRA has one kind for {one} and {other}, this adapter several: {OWN}")
        return super().write_config(method, deltas, hyper)

    def read_config(self, method, config, sites, found):
        hyper = super().read_config(method, config, sites, found)
        return hyper | {"b": hyper["a"], "e": hyper["d"]}


_TENSORS = {
    f"{name}{ours}": As(f"glora_{name}.{theirs}", optional=True)
    for name in "ABCDE"
    for ours, theirs in {"": "X", "_down": "Xd", "_up": "Xu", "_none": "zeros"}.items()
}


class GLoRA(Delta, name="glora"):
    """W' = W + W * A + B and b' = b + b * D + E + W_0 C, where W_0 [out, in] is the base's matrix.

    Each of the tensors A and B [out, in], C [in], D and E [out] is

        lora       a product `down` [rows, rank] times `up` [rank, columns], up random and down zero at first (A, B, C)
        vector     one value per output for A, B, D and E, per input for C, zero at first
        constant   one value (A, B, D, E), zero at first
        none       left out

    Where the host has no bias, C, D and E are left out, as in Hugging Face PEFT, whose defaults these are. The paper
    finds the kinds of each layer by an evolutionary search; here they are hyperparameters. W' is formed in the forward
    and again in the backward pass, not kept.
    """

    papers = (
        Paper(
            "One-for-All: Generalized LoRA for Parameter-Efficient Fine-tuning",
            "Chavan et al.",
            2023,
            "https://arxiv.org/abs/2306.07967",
        ),
    )
    known = (
        "Its authors report higher accuracy than earlier methods on natural, specialised and structured image tasks "
        "with fewer parameters, and good few-shot learning, where the form of each layer is searched for. That search "
        "is not done here."
    )
    hosts = ("linear",)
    small = dict(rank=2)
    peft = _GloraPeft(
        "GLORA",
        _TENSORS,
        config={"r": "rank", "config_A_B": "a", "config_C": "c", "config_D_E": "d"},
        fixed={"bias": "none"},
        neutral=frozenset({"init_weights"}),
        own=frozenset({"b", "e"}),
        hosts=("Linear",),
    )

    def __init__(
        self,
        site,
        *,
        rank: Annotated[int, "rank of the tensors of kind lora", Range(1)] = 8,
        a: Annotated[Kind, "kind of A, which scales the weight"] = "lora",
        b: Annotated[Kind, "kind of B, which shifts the weight"] = "lora",
        c: Annotated[Literal["lora", "vector", "none"], "kind of C, a prompt that goes through the weight"] = "lora",
        d: Annotated[Literal["vector", "constant", "none"], "kind of D, which scales the bias"] = "constant",
        e: Annotated[Literal["vector", "constant", "none"], "kind of E, which shifts the bias"] = "constant",
    ):
        super().__init__(site)
        out, columns = site.d_out, site.d_in
        kinds = {"A": a, "B": b} | ({} if site.bias is None else {"C": c, "D": d, "E": e})
        self.kinds = tuple(kinds.get(name, "none") for name in "ABCDE")
        if set(self.kinds) == {"none"}:
            raise GraftError(f"glora: nothing is left to train at {site.path}: a or b must not be none there")
        for name, kind in zip("ABCDE", self.kinds):
            rows, width = {"A": (out, columns), "B": (out, columns), "C": (columns, 1)}.get(name, (out, 0))
            if kind == "lora":
                up = nn.init.kaiming_uniform_(torch.empty(rank, width), a=5**0.5)
                self.register_parameter(f"{name}_down", nn.Parameter(torch.zeros(rows, rank)))
                self.register_parameter(f"{name}_up", nn.Parameter(up))
            elif kind != "none":
                shape = (1,) if kind == "constant" else (rows, 1) if width else (rows,)
                self.register_parameter(name, nn.Parameter(torch.zeros(shape)))

    def of(self, name):
        """The tensors of A, B, C, D or E: one, the two of a product, or none."""
        return [p for n, p in self.named_parameters() if n[0] == name]

    def forward(self, inner, x):
        w, b = inner.weight, self.bias(inner.bias)
        form, pull = (functools.partial(f, self.kinds[:2]) for f in (_formed, _gradients))
        return self.site.apply_formed(x, form, w, b, *self.of("A"), *self.of("B"), pull=pull)

    def weight(self, w):
        tensors = [*self.of("A"), *self.of("B")]
        wide = torch.promote_types(w.dtype, torch.float32)
        return _formed(self.kinds[:2], w.to(wide), *tensors)

    def bias(self, b):
        if b is None:
            return b
        C, D, E = (_value(self.of(name)) for name in "CDE")
        new = b if D is None else b + b * D
        if E is not None:
            new = new + E
        w = self.site.weight
        return new if C is None else new + (w @ C.to(w.dtype)).flatten()


def _value(tensors):
    if not tensors:
        return None
    return tensors[0] @ tensors[1] if len(tensors) == 2 else tensors[0]


def _cut(kinds, tensors):
    """The tensors of A and those of B."""
    count = {"lora": 2, "none": 0}.get(kinds[0], 1)
    return tensors[:count], tensors[count:]


def _formed(kinds, w, *tensors):
    """W + W * A + B."""
    A, B = _cut(kinds, tensors)
    scale = _value(A)
    new = w if scale is None else torch.addcmul(w, w, scale)
    if len(B) == 2:
        return torch.addmm(new, *B)
    return new + B[0] if B else new


def _gradients(kinds, g, x, w, *tensors):
    """dL/dA and dL/dB from dL/dW', which is that of B and, times W, that of A."""
    G = g.mT @ x
    A, B = _cut(kinds, tensors)
    return (*_split(G * w.to(G.dtype) if A else G, A), *_split(G, B))


def _split(G, tensors):
    """The gradients of a product, a vector or a constant from that of the matrix [out, in] it stands for."""
    if len(tensors) < 2:
        return [G.sum_to_size(t.shape if t.dim() > 1 else (1, 1)).view(t.shape).to(t.dtype) for t in tensors]
    down, up = tensors
    return (G @ up.to(G.dtype).mT).to(down.dtype), (down.to(G.dtype).mT @ G).to(up.dtype)
