"""Adapters after both sub-layers. Houlsby et al., 2019."""

from typing import Annotated, Literal

from torch import nn

from ...core.delta import Paper
from ...core.formats.adapter_hub import bottleneck
from ...core.hyper import Range
from .bottleneck import Serial


class Houlsby(Serial, name="houlsby"):
    """h' = h + up(act(down(h))) after the attention and after the MLP of each block, before the residual connection.

    h [..., width] is the output of the sub-layer, down [size, width], up [width, size]. Weights start from a normal
    distribution cut at two standard deviations, biases at zero: close to the base, not equal to it.
    """

    papers = (
        Paper(
            "Parameter-Efficient Transfer Learning for NLP", "Houlsby et al.", 2019, "https://arxiv.org/abs/1902.00751"
        ),
    )
    known = (
        "Its authors report results within 0.4 % of full fine-tuning on GLUE with 3.6 % more parameters for each task. "
        "The authors of LoRA hold against adapters that they add latency in inference, since they cannot be merged."
    )
    hosts = ("module",)
    targets = ["attention", "mlp"]
    starts_as_base = False
    small = dict(size=3)
    adapter_hub = bottleneck(
        "mh_adapter", "output_adapter",
        mh_adapter=True, output_adapter=True, is_parallel=False, original_ln_before=False, scaling=1.0,
    )  # fmt: skip

    def __init__(
        self,
        site,
        *,
        size: Annotated[int, "features of the bottleneck", Range(1)] = 64,
        activation: Annotated[Literal["gelu", "relu", "silu", "tanh"], "between the two maps"] = "gelu",
        std: Annotated[float, "standard deviation of the initial weights", Range(above=0)] = 0.01,
    ):
        super().__init__(site, size, activation)
        for layer in (self.down, self.up):
            nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
            nn.init.zeros_(layer.bias)
