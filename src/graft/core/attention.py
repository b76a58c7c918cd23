"""The attention product as a host: (q, k, v, mask) -> output, of transformers models.

transformers looks the product up by the name in the attention module's configuration at every call. While deltas of
the product run at a module, it has a configuration of its own with our name in it; the model's stays as it was, so
masks are built as before.
"""

import copy
import functools
import sys
from typing import Any

from .delta import Delta, Host, Link
from .errors import GraftError
from .site import Site

NAME = "graft"


class AttentionSite(Site):
    """An attention module (the owner of the q, k and v projections)."""

    kind = "attention"

    def __init__(self, path, module, **position):
        super().__init__(path, module, **position)
        config: Any = getattr(module, "config", None)
        if getattr(config, "_attn_implementation", None) is None:
            raise GraftError(
                f"{path} ({type(module).__name__}) does not look its attention product up by name: "
                f"choose the attention modules of a transformers model that does"
            )
        self.base_config = config

    def plain(self):
        """The product which the module would use by itself."""
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        name = self.base_config._attn_implementation
        if name == "eager":
            base = getattr(self.module, "host_class", type(self.module))
            return sys.modules[base.__module__].eager_attention_forward
        return ALL_ATTENTION_FUNCTIONS[name]

    def relinked(self, deltas):
        product = [d for d in deltas if d.place == "product"]
        state = self.module.__dict__
        if not product:
            state.pop("product", None)
            state["config"] = self.base_config
            return
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        ALL_ATTENTION_FUNCTIONS.register(NAME, _product)
        state["product"] = functools.reduce(Link, product, Host(self, functools.partial(self.plain(), self.module)))
        if state["config"] is self.base_config:
            state["config"] = copy.copy(self.base_config)
            state["config"].__dict__["_attn_implementation_internal"] = NAME


def _product(module, *args, **kwargs):
    return module.product(*args, **kwargs)


class Attention(Delta):
    """A delta of the attention product; the host is an attention module.

    `forward(inner, q, k, v, mask, **kwargs)`: q [batch, heads, length, size], k and v [batch, kv heads, ...];
    inner returns (output [batch, length, heads, size], weights).
    """

    hosts = ("attention",)
    targets = "attention"
    place = "product"
