"""The attention product as a host: (q, k, v, mask) -> output, of transformers models.

transformers looks the product up by the name in the attention module's configuration at every call. While deltas of
the product run at a module, it has a configuration of its own with our name in it; the model's stays as it was, so
masks are built as before.
"""

import copy
import functools
import inspect
import re
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import host as hosting
from .delta import Delta
from .errors import GraftError
from .host import Host, Link, base_modules
from .site import Site
from .stacked import each_of, left_padded

NAME = "graft"
SEPARATE = (("k_proj", "v_proj"), ("key", "value"), ("k", "v"), ("k_lin", "v_lin"))
FUSED = ("c_attn", "qkv_proj", "Wqkv")  # rows [q; k; v]
SIZES = ("head_dim", "attention_head_size", "key_value_proj_dim", "head_size")


class AttentionSite(Site):
    """An attention module (the owner of the q, k and v projections)."""

    kind = "attention"

    def __init__(self, path, module, **position):
        super().__init__(path, module, **position)
        cls: Any = getattr(module, "host_class", type(module))
        config: Any = getattr(module, "config", None)
        code = getattr(inspect.unwrap(cls.forward), "__code__", None)
        if config is None or code is None or "ALL_ATTENTION_FUNCTIONS" not in code.co_names:
            raise GraftError(
                f"{path or 'the model'} ({cls.__name__}) does not look its attention product up by name: "
                f"choose the attention modules of a transformers model that does"
            )
        self.base_config = module.site.base_config if "product" in module.__dict__ else config
        self.eager = getattr(sys.modules[cls.__module__], "eager_attention_forward", None)

    @property
    def implementation(self) -> str:
        """The name of the product which the module would use by itself: "eager", "sdpa", ..."""
        return self.base_config._attn_implementation

    def plain(self, *args, **kwargs):
        """The product which the module would use by itself."""
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        name = self.implementation
        product: Any = self.eager if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]
        return product(self.module, *args, **kwargs)

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """K and V [kv heads, n, size] which the module's own projections give for n states x [n, width]."""
        module, config = self.module, self.base_config
        heads = config.num_attention_heads
        size = next((getattr(module, a) for a in SIZES if hasattr(module, a)), config.hidden_size // heads)

        def split(t: Tensor) -> Tensor:
            return t.unflatten(-1, (-1, size)).transpose(0, 1)

        for key, value in SEPARATE:
            if hasattr(module, key) and hasattr(module, value):
                return split(getattr(module, key)(x)), split(getattr(module, value)(x))
        for name in FUSED:
            if hasattr(module, name):
                rest = getattr(module, name)(x)[..., heads * size :]
                k, v = rest.chunk(2, -1)
                return split(k), split(v)
        if hasattr(module, "query_key_value"):  # GPT-NeoX: q, k and v of a head stand together
            qkv = module.query_key_value(x).unflatten(-1, (-1, 3, size)).transpose(0, 1)
            return qkv[:, :, 1], qkv[:, :, 2]
        raise GraftError(f"{self.path} ({type(module).__name__}): its projections of keys and values were not found")

    def sources(self) -> list[nn.Module]:
        """The modules which decide what `keys_values` gives: those inside, with the deltas that run there."""
        inside = base_modules(self.module).values()
        chains = ({} if m is self.module else m.__dict__ for m in inside)
        return [s for m, own in zip(inside, chains) for s in (own["chain"].sources() if "chain" in own else [m])]

    @functools.cached_property
    def kv_shape(self) -> tuple[int, int]:
        """(kv heads, size of a head)."""
        where = self.where()
        with torch.no_grad():
            k, v = self.keys_values(where.new_zeros(1, self.base_config.hidden_size))
        if k.shape != v.shape:
            raise GraftError(f"{self.path} ({type(self.module).__name__}): its keys and values differ in size")
        return k.shape[0], k.shape[2]

    def relinked(self, deltas):
        product = [d for d in deltas if d.place == "product"]
        state = self.module.__dict__
        if not any(getattr(d, "place", "") == "product" for d in self.module.deltas.values()):
            if state.pop("product", None) is not None:
                state["config"] = self.base_config
            return
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        ALL_ATTENTION_FUNCTIONS.register(NAME, _product)
        state["product"] = functools.reduce(Link, product, Host(self, self.plain))
        if state["config"] is self.base_config:
            state["config"] = copy.copy(self.base_config)
            state["config"].__dict__["_attn_implementation_internal"] = NAME


def _product(module, *args, **kwargs):
    if hosting.routed is not None:
        return hosting.run(module, "product", module.product, *args, **kwargs)
    return module.product(*args, **kwargs)


class Attention(Delta):
    """A delta of the attention product of self-attention; the host is an attention module.

    `forward(inner, q, k, v, mask, **kwargs)`: q [batch, heads, length, size], k and v [batch, kv heads, ...];
    inner returns (output [batch, length, heads, size], weights). Where `prepare` returns K and V [kv heads, n, size],
    of any n, they stand before k and v; for anything else override `stack` and `act_stacked`.
    """

    hosts = ("attention",)
    targets = "attention"
    place = "product"
    stacks_itself = True

    @classmethod
    def refuses(cls, site):
        where = ".".join(site.path.split(".")[-2:]) + type(site.module).__name__
        if getattr(site.module, "is_cross_attention", False) or re.search("cross|encoder_attn|encdec", where, re.I):
            return f"it is a cross attention, and {cls.name} works on self-attention"

    def forward(self, inner, q, k, v, mask=None, **kwargs):
        # A projection from which it is prepared may drop features at random in training.
        own = self.prepare(inner) if self.site.module.training else self.prepared(inner, q.dtype)
        return self.act_stacked(inner, self.stack([own]), q, k, v, mask, **kwargs)

    @classmethod
    def stack(cls, prepared: list) -> Any:
        """What the deltas of b rows prepared, as one; None for a row without a delta."""
        K, keep = left_padded([p[0] if p else None for p in prepared])
        return K, left_padded([p[1] if p else None for p in prepared])[0], keep

    def act_stacked(self, inner, stacked, q, k, v, mask=None, **kwargs):
        """The product, where row i of the b rows `stacked` is for batch / b neighbours."""
        K, V, keep = stacked
        return self.prepend(inner, K, V, keep, q, k, v, mask, **kwargs)

    def prepend(self, inner, K: Tensor, V: Tensor, keep: Tensor | None, q, k, v, mask, **kwargs):
        """The product over [K; k] and [V; v]: K, V [b, kv heads, n, size] are seen from every position, at distance 0.

        keep [b, n] tells which of the n count in a row; all of them if left out.
        """
        name, n, batch = self.site.implementation, K.shape[2], len(k)
        if name not in ("eager", "sdpa"):
            raise GraftError(
                f"{self.name} works with eager and sdpa attention, {self.site.path} uses {name}: "
                f"call model.set_attn_implementation('sdpa')"
            )
        K, V = each_of(K, batch, self.site.path), each_of(V, batch, self.site.path)
        causal = kwargs.get("is_causal")
        causal = getattr(self.site.module, "is_causal", True) if causal is None else causal
        if mask is None and name == "sdpa" and ((causal and q.shape[2] > 1) or keep is not None):
            mask = q.new_ones(q.shape[2], k.shape[2], dtype=torch.bool)  # sdpa would count positions from the first key
            mask = (mask.tril() if causal and q.shape[2] > 1 else mask)[None, None]
            kwargs["is_causal"] = False
        elif mask is None and keep is not None:
            mask = q.new_zeros(1, 1, q.shape[2], k.shape[2])
        if mask is not None:
            mask = F.pad(mask, (n, 0), value=mask.dtype == torch.bool)  # True lets through; a number is added
        if mask is not None and keep is not None:
            hidden = F.pad(~each_of(keep, batch, self.site.path), (0, k.shape[2]))[:, None, None]
            out = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
            mask = mask.expand(batch, -1, -1, -1).masked_fill(hidden, out)
        if kwargs.get("position_bias") is not None:
            kwargs["position_bias"] = F.pad(kwargs["position_bias"], (n, 0))
        k = torch.cat([K.to(k.dtype), k], 2)
        v = torch.cat([V.to(v.dtype), v], 2)
        return inner(q, k, v, mask, **kwargs)
