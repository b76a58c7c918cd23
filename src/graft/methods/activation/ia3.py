"""(IA)3: Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning. Liu et al., 2022."""

import re
from typing import Annotated, Literal

import torch
from torch import nn

from ...core.delta import Delta, Paper
from ...core.errors import GraftError
from ...core.formats.adapter_hub import LoraHub
from ...core.formats.lycoris import Lycoris
from ...core.formats.peft import OWN, As, Peft
from ...core.recipe import ByPath


class _IA3Peft(Peft):
    """PEFT names the modules whose inputs are scaled, and keeps l as a row for them, as a column for the others."""

    def site_out(self, delta):
        if delta.site.kind == "conv":
            return {"ia3_l": delta.l.view(1, -1, *[1] * (delta.site.module.weight.dim() - 2))}
        return {"ia3_l": delta.l[None] if delta.on == "input" else delta.l[:, None]}

    def write_config(self, method, deltas, hyper):
        inputs = [re.escape(path) for path, d in deltas.items() if d.on == "input"]
        return super().write_config(method, deltas, hyper) | {"feedforward_modules": "|".join(inputs) or []}

    def read_config(self, method, config, sites, found):
        names = config.get("feedforward_modules") or []

        def on_input(path):
            return re.fullmatch(names, path) if isinstance(names, str) else path.endswith(tuple(names))

        sides = {path: "input" if on_input(path) else "output" for path in sites}
        return super().read_config(method, config, sites, found) | {"on": ByPath(sides)}


class _IA3Lycoris(Lycoris):
    """LyCORIS keeps l - 1, and leaves the bias of the host as it is."""

    def check(self, delta):
        super().check(delta)
        self.bias(delta.site, delta.on)
        if delta.on == "input" and getattr(delta.site.module, "groups", 1) > 1:
            raise GraftError(f"LyCORIS cannot scale the inputs of {delta.site.path}, a convolution in groups: {OWN}")

    def write(self, delta):
        l = delta.l - 1
        shape = (1, -1, *[1] * (delta.site.module.weight.dim() - 2)) if delta.site.kind == "conv" else (-1,)
        return {"weight": l.view(shape), "on_input": torch.tensor(int(delta.on == "input"))}

    def read(self, site, found):
        on = "input" if found["on_input"].item() else "output"
        self.bias(site, on)
        return {"on": on}, {"l": found["weight"].flatten() + 1}

    def bias(self, site, on):
        if on == "output" and site.bias is not None:
            raise GraftError(f"LyCORIS's (IA)3 scales the output of {site.path} without its bias, (IA)3 with it: {OWN}")


class _IA3Hub(LoraHub):
    """The library scales outputs, with their bias, and all of them by alpha besides."""

    def write_config(self, deltas, homes):
        if inputs := [path for path, d in deltas.items() if d.on == "input"]:
            raise GraftError(f"`adapters` scales outputs only, this adapter the input of {inputs[0]}: {OWN}")
        return {"alpha": 1, "dropout": 0.0}

    def read_config(self, config, state):
        if config.get("alpha") != 1:
            raise GraftError(f"(IA)3 has no counterpart of alpha={config.get('alpha')}, by which `adapters` scales too")
        return {"on": "output"}


_ATTENTION = re.compile(r"(.*\.)?([qkvo]|qkv|query|key|value|out)(_proj)?")  # narrow with few key heads


class IA3(Delta, name="ia3"):
    """y' = l * f(x) for keys and values, y' = f(l * x) for the last matrix of the MLP; l [out] or [in] starts at one.

    `on` chooses the side. "auto" scales the input where the host narrows (out < in) and is not one of the projections
    of attention by name, which is the last matrix of an MLP, behind the activation; everywhere else the output.
    """

    papers = (
        Paper(
            "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning",
            "Liu et al.",
            2022,
            "https://arxiv.org/abs/2205.05638",
        ),
    )
    known = (
        "Its authors report better accuracy than by in-context learning at far lower cost, and with a recipe on T0 6 % "
        "more than the state of the art on RAFT, a benchmark of few examples."
    )
    hosts = ("linear", "conv")
    neutral = {"l": 1.0}
    peft = _IA3Peft(
        "IA3",
        {"l": As("ia3_l", read=lambda site, value: value.flatten())},
        neutral=frozenset({"feedforward_modules", "init_ia3_weights"}),
        own=frozenset({"on"}),
        hosts=("Linear", "Conv1D", "Conv2d", "Conv3d"),
    )
    adapter_hub = _IA3Hub(
        "loras",
        {"l": As("lora_B", lambda site, l: l[:, None], lambda site, l: l.flatten())},
        fixed={"architecture": "lora", "composition_mode": "scale", "use_dora": False, "use_gating": False, "r": 1}
        | {"vera_d": None, "vera_b": None},
        neutral=frozenset({"alpha", "dropout"}),
        own=frozenset({"on"}),
    )
    lycoris = _IA3Lycoris({"l": As("weight"), "on": As("on_input")})
    targets = (
        r"(k|v|key|value)(_proj)?|kv_proj|c_attn|(w|W)?qkv(_proj)?|query_key_value|"
        r"down_proj|dense_4h_to_h|fc2|fc_out|w2|wo|mlp\.c_proj|(?<!attention\.)output\.dense"
    )

    def __init__(
        self,
        site,
        *,
        on: Annotated[Literal["auto", "output", "input"], "what is scaled: the output or the input"] = "auto",
    ):
        super().__init__(site)
        if on == "auto":
            down = site.kind == "linear" and site.d_out < site.d_in and not _ATTENTION.fullmatch(site.path)
            on = "input" if down else "output"
        self.on, self.passes_x = on, on == "output"
        self.l = nn.Parameter(torch.ones(site.inputs if on == "input" else site.d_out))

    def prepare(self, inner):
        return (self.l,)

    def act(self, inner, x, l):
        return self.site.scale(inner(x), l) if self.passes_x else inner(self.site.scale(x, l))

    def weight(self, w):
        return w * (self.site.columns(self.l) if self.on == "input" else self.site.rows(self.l))

    def bias(self, b):
        return b if b is None or self.on == "input" else b * self.l
