"""Prefix tuning (Li and Liang, 2021) and P-tuning v2 (Liu et al., 2021)."""

import inspect
import sys
from typing import Annotated

import torch
from torch import nn

from ...core.attention import Attention
from ...core.delta import Paper
from ...core.errors import GraftError
from ...core.formats.peft import OWN, PromptPeft
from ...core.hyper import Range

_STATIC = ("default", "linear", "llama3", "yarn")  # rotations which depend on nothing but the position


class _PrefixPeft(PromptPeft):
    """PEFT puts the prefix into the cache, [length, layers (K, V) heads size], where it moves the tokens by length.

    With rotary positions that is our prefix with its K turned by length. What a network gives is saved as K and V.
    """

    def embeddings(self, adapter):
        deltas = list(adapter.deltas.values())
        check_layers(d.site for d in deltas)
        rows = []
        for d in deltas:
            with torch.no_grad():
                K, V = d.prefix()
            rows += [turned(adapter.model, d.site, K, K.shape[1]), V]
        if len({t.shape for t in rows}) > 1:
            raise GraftError(f"PEFT's prefixes have one size in all layers: {OWN}")
        return torch.stack(rows).permute(2, 0, 1, 3).flatten(1)

    def write_config(self, method, deltas, hyper):
        heads, size = next(iter(deltas.values())).site.kv_shape
        shape = {"num_layers": len(deltas), "num_attention_heads": heads, "token_dim": heads * size}
        return super().write_config(method, deltas, hyper) | shape | {"prefix_projection": False}

    def from_embeddings(self, model, sites, value, config):
        check_layers(sites.values())
        heads, size = next(iter(sites.values())).kv_shape
        if value.dim() != 2 or value.shape[1] != 2 * len(sites) * heads * size:
            raise GraftError(
                f"the saved prefix has shape {tuple(value.shape)}, {len(sites)} layers with {heads} heads of keys and "
                f"values of size {size} need {2 * len(sites) * heads * size} columns"
            )
        rows = value.unflatten(1, (len(sites), 2, heads, size)).permute(1, 2, 3, 0, 4)
        state = {}
        for (path, site), (K, V) in zip(sites.items(), rows):
            state |= {f"{path}:keys": turned(model, site, K, -K.shape[1]), f"{path}:values": V.contiguous()}
        return state


def check_layers(sites) -> None:
    """Refuse what PEFT's prefix in the cache cannot be turned into."""
    sites = list(sites)
    config = sites[0].base_config
    if len(sites) != getattr(config, "num_hidden_layers", None):
        raise GraftError(f"PEFT has prefixes in all layers, this adapter in {len(sites)}: {OWN}")
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        raise GraftError("with sliding windows PEFT's prefixes leave the window, ours do not: no exchange")


def turned(model, site, K, by: int):
    """K [kv heads, n, size] turned by `by` positions, as the model's rotary embedding turns keys."""
    rotary = [m for n, m in model.named_modules() if n.rpartition(".")[2] == "rotary_emb"]
    cls = getattr(site.module, "host_class", type(site.module))
    apply = getattr(sys.modules[cls.__module__], "apply_rotary_pos_emb", None)
    plain = len(rotary) == 1 and [*inspect.signature(rotary[0].forward).parameters] == ["x", "position_ids"]
    if apply is None or not plain or getattr(rotary[0], "rope_type", "") not in _STATIC:
        raise GraftError(
            f"PEFT's prefix moves the positions of the tokens; only with plain rotary positions is that a prefix of "
            f"ours, which {cls.__name__} does not have"
        )
    with torch.no_grad():
        cos, sin = rotary[0](K, torch.full((1, 1), abs(by), device=K.device))
        scale = getattr(rotary[0], "attention_scaling", 1.0) or 1.0
        return apply(K[None], K[None], cos / scale, sin / scale * (1 if by > 0 else -1))[0][0]


class PrefixTuning(Attention, name="prefix_tuning"):
    """o = softmax(q [K; k]^T c) [V; v] in every self-attention, K and V [kv heads, length, size] trained, c the scale.

    The prefix stands in front of the keys after positions were put into them, and not in the cache: token t keeps
    position t, and no relative position bias falls on the prefix. (PEFT puts the prefix into the cache, so that token t
    is at position length + t. With rotary positions its K is ours turned by length positions; with learned positions
    the two are different models.)

    P-tuning v2 trains K and V themselves. With `reparameterize`, as in prefix tuning, they come out of a network,
    [K, V] = U tanh(W E + b) + a, with E [length, width], W [hidden, width] and b shared by all layers and U, a of each
    layer: the original's one network, whose last matrix has the rows of all layers.
    """

    papers = (
        Paper(
            "Prefix-Tuning: Optimizing Continuous Prompts for Generation",
            "Li and Liang",
            2021,
            "https://arxiv.org/abs/2101.00190",
        ),
        Paper(
            "P-Tuning v2: Prompt Tuning Can Be Comparable to Fine-tuning Universally Across Scales and Tasks",
            "Liu et al.",
            2021,
            "https://arxiv.org/abs/2110.07602",
        ),
    )
    known = (
        "Its authors report results comparable to full fine-tuning in generation with 0.1 % of the parameters, and "
        "better ones with little data; those of P-Tuning v2 report the same for language understanding. The authors of "
        "`When Do Prompting and Prefix-Tuning Work?` prove that it can express strictly less than full fine-tuning."
    )
    starts_as_base = False
    small = dict(length=3)
    adapter_hub = "it saves prefixes as pickles only, which are never read"
    peft = _PrefixPeft(
        "PREFIX_TUNING",
        config={"num_virtual_tokens": "length"},
        fixed={"num_transformer_submodules": 1},
        neutral=frozenset(
            {
                "token_dim",
                "num_attention_heads",
                "num_layers",
                "encoder_hidden_size",
                "prefix_projection",
                "init_weights",
            }
        ),
        own=frozenset({"reparameterize", "hidden"}),
    )

    def __init__(
        self,
        site,
        shared=None,
        *,
        length: Annotated[int, "vectors of the prefix", Range(1)] = 20,
        reparameterize: Annotated[bool, "train a network that gives K and V, instead of K and V"] = False,
        hidden: Annotated[int, "width of that network", Range(1)] = 512,
    ):
        super().__init__(site, shared)
        self.heads, self.size = heads, size = site.kv_shape
        if reparameterize:
            self.up = nn.Linear(hidden, 2 * heads * size)
        else:
            self.keys = nn.Parameter(torch.randn(heads, length, size))
            self.values = nn.Parameter(torch.randn(heads, length, size))

    @classmethod
    def share(cls, sites, *, length, reparameterize, hidden):
        return Reparameterization(length, sites[0].base_config.hidden_size, hidden) if reparameterize else None

    def prefix(self):
        """K and V [kv heads, length, size]."""
        if self.shared is None:
            return self.keys, self.values
        K, V = self.up(self.shared()).unflatten(-1, (2, self.heads, self.size)).permute(1, 2, 0, 3)
        return K, V

    def prepare(self, inner):
        return self.prefix()


class Reparameterization(nn.Module):
    """tanh(W E + b): [length, hidden]."""

    def __init__(self, length: int, width: int, hidden: int):
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(length, width))
        self.down = nn.Linear(width, hidden)

    def forward(self):
        return torch.tanh(self.down(self.embedding))
