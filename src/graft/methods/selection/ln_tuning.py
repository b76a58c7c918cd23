"""LN tuning: the gains and biases of the normalisation layers."""

import torch
from torch import nn

from ...core.delta import Delta, Paper
from ...core.errors import GraftError
from ...core.formats.lycoris import OWN, Lycoris
from ...core.formats.peft import As, Peft


def _whole(name: str) -> As:
    """PEFT trains a copy of the module, so that its tensor is the module's own with ours added."""
    at = f"ln_tuning_layers.{name}"
    add = lambda site, value: getattr(site.module, name).detach().to(value) + value
    take = lambda site, value: value - getattr(site.module, name).detach().to(value)
    return As(at, add, take, optional=name == "bias")


class _NormLycoris(Lycoris):
    def check(self, delta):
        super().check(delta)
        if delta.site.bias is None:
            raise GraftError(f"LyCORIS needs norms with a bias, {delta.site.path} has none: {OWN}")


class LNTuning(Delta, name="ln_tuning"):
    """y' = n(x) (g + c) + (b + d): gain g [d] and, where there is one, bias b [d] of the norms are trained.

    c and d start at zero. Works on LayerNorm, RMSNorm and those which keep g - 1 (Gemma).
    """

    papers = (
        Paper(
            "Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning",
            "Zhao et al.",
            2023,
            "https://arxiv.org/abs/2312.11420",
        ),
    )
    known = (
        "Its authors report, where language models learn to see, over 20 % more than LoRA on average over five tasks "
        "at 13 billion parameters, with 41.9 % fewer trained and 17.6 % less memory."
    )
    hosts = ("norm",)
    targets = "norms"
    neutral = {"c": 0.0, "d": 0.0}
    lycoris = _NormLycoris({"c": As("w_norm"), "d": As("b_norm", optional=True)}, hosts=("LayerNorm", "GroupNorm"))
    peft = Peft("LN_TUNING", {"c": _whole("weight"), "d": _whole("bias")}, hosts=())

    def __init__(self, site):
        super().__init__(site)
        self.c = nn.Parameter(torch.zeros(site.d_out))
        self.d = nn.Parameter(torch.zeros(site.d_out)) if site.bias is not None else None

    def weight(self, w):
        return w + self.c

    def bias(self, b):
        return b if b is None or self.d is None else b + self.d
