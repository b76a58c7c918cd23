"""DoRA: Weight-Decomposed Low-Rank Adaptation. Liu et al., 2024."""

from dataclasses import replace
from typing import Annotated

from torch import nn

from ...core.delta import Paper
from ...core.errors import GraftError
from ...core.factored import Initialised, Start
from ...core.formats import OWN
from ...core.formats.adapter_hub import LoraHub
from ...core.formats.lycoris import LowRank, tucker
from ...core.formats.peft import As
from ...core.hyper import Range
from .lora import LoRA


def _per_channel(site, m):
    """Along the channels of a convolution's output."""
    return m.view(1, -1, *[1] * (site.module.weight.dim() - 2)) if site.kind == "conv" else m


def _of_rows(site, value):
    """From LyCORIS's shape, which tells whether rows or columns are normalised."""
    if value.shape[0] != site.d_out:
        raise GraftError(f"dora_scale of {site.path} is for columns (wd_on_output=False), DoRA normalises rows")
    return value.flatten()


class _DoraHub(LoraHub):
    """The library takes the norms without the scaling, and scales the bias too."""

    def check(self, site):
        if site.bias is not None:
            raise GraftError(f"`adapters` scales the bias of {site.path} with DoRA's magnitudes, DoRA does not: {OWN}")

    def site_out(self, delta):
        low = delta.low
        return {"lora_A": low.A, "lora_B": low.scaling * low.B, "m.weight": delta.m[:, None]}

    def write_config(self, deltas, homes):
        return {"alpha": len(next(iter(deltas.values())).low.A)}

    def read_config(self, config, state):
        if config["alpha"] != config["r"]:
            raise GraftError(f"`adapters` leaves alpha={config['alpha']} out of DoRA's norms: only alpha = r is DoRA")
        return {"alpha": float(config["alpha"])}


class _Flat(LowRank):
    """A LoCon in Tucker form is multiplied out: DoRA has none."""

    def plain(self, site, found):
        mid = found.pop("lora_mid.weight", None)
        return found if mid is None else found | {"lora_down.weight": tucker(site, mid, found["lora_down.weight"])}


_M = As("lora_magnitude_vector", _per_channel, lambda site, value: value.flatten())


class DoRA(Initialised, name="dora"):
    """W' = diag(m / ||V||) V with V = W + s B A and ||V|| [out] the norms of its rows (equation 5).

    m [out] is trained from the norms of W, beside LoRA's A [rank, in] and B [out, rank], so that the adapted model
    starts as the base. The norms are constants for the gradient (section 4.3) and come in closed form, without
    s B A [out, in]; activations are rescaled, y = (W x + s B (A x)) m / ||V|| + bias. Dropout falls on the input of the
    low-rank update only.
    """

    papers = (
        Paper("DoRA: Weight-Decomposed Low-Rank Adaptation", "Liu et al.", 2024, "https://arxiv.org/abs/2402.09353"),
    )
    known = (
        "Its authors report better results than LoRA on commonsense reasoning, visual instruction tuning and "
        "understanding of images and videos. The authors of SMT find that, like LoRA, it stops gaining and then loses "
        "as more parameters are trained."
    )
    small = dict(rank=2)
    passes_x = True
    peft = replace(
        LoRA.peft,
        tensors={f"low.{name}": LoRA.peft.tensors[name] for name in "AB"} | {"m": _M},
        embedding={f"low.{name}": form for name, form in LoRA.peft.embedding.items()} | {"m": _M},
        config={field: name for field, name in LoRA.peft.config.items() if name != "bias"},
        fixed={"bias": "none", "use_dora": True, "lora_bias": False},
    )
    adapter_hub = _DoraHub(
        "loras",
        {"low.A": As("lora_A"), "low.B": As("lora_B"), "m": As("m.weight", read=lambda site, m: m.flatten())},
        config={"r": "rank", "dropout": "dropout"},
        fixed=LoRA.adapter_hub.fixed | {"use_dora": True},
        neutral=frozenset({"alpha"}),
        own=LoRA.adapter_hub.own,
    )
    lycoris = _Flat(
        {f"low.{name}": LoRA.lycoris.tensors[name] for name in "AB"}
        | {"m": As("dora_scale", lambda site, m: m.view(-1, *[1] * (site.module.weight.dim() - 1)), _of_rows)},
        also=frozenset({"lora_mid.weight"}),
        rank="low.A",
    )

    def __init__(
        self,
        site,
        *,
        rank: Annotated[int, "rank of the update of the direction", Range(1)] = 8,
        alpha: Annotated[float, "numerator of the scaling s"] = 16.0,
        dropout: Annotated[float, "probability of dropping an input of the update", Range(0, below=1)] = 0.0,
        rslora: Annotated[bool, "scale by alpha / sqrt(rank), which keeps high ranks learning"] = False,
        init: Start = "random",
    ):
        super().__init__(site)
        self.low = LoRA(site, rank=rank, alpha=alpha, dropout=dropout, rslora=rslora, init=init)
        self.m = nn.Parameter(self.low.row_norms(site.weight_now))

    def absorbed(self):
        if (plain := self.low.absorbed()) is None:
            return None
        hyper, tensors = plain
        return hyper, {f"low.{name}": t for name, t in tensors.items()} | {"m": self.m}

    def prepare(self, inner):
        # As a difference: exact at the start, in half precision too.
        gain = self.m / self.low.row_norms(inner.weight) - 1
        A, B, _ = self.low.prepare(inner)
        return A, B, gain, inner.bias

    def act(self, inner, x, A, B, gain, bias):
        return self.site.rescale(self.low.act(inner, x, A, B), gain, bias)

    def weight(self, w):
        return (self.m / self.low.row_norms(w))[:, None] * self.low.weight(w)
