"""One adapter a block. Pfeiffer et al., 2020."""

from typing import Annotated, Literal

from torch import nn

from ...core.delta import Paper
from ...core.formats.adapter_hub import bottleneck
from ...core.hyper import Range
from ...core.site import kind_of
from .bottleneck import Serial


class Pfeiffer(Serial, name="pfeiffer"):
    """A(z) + r after the MLP of each block: z is the block's normalised or summed state, r the output of the MLP.

    Pre-norm models (Llama, GPT-2, ViT): the host is the block, y = x + r, and y' = y + A(y), A(y) = up(act(down(y))).
    Post-norm models (BERT, RoBERTa, DistilBERT): the host is the block's last LayerNorm n, called with x + r, and
    n'(x + r) = n(x + r + A(n(x + r))). (In BART, whose blocks do not tell, target `final_layer_norm` for that.)
    down [size, width], up [width, size]; weights start from a normal distribution with standard deviation 0.02.
    """

    papers = (
        Paper(
            "MAD-X: An Adapter-Based Framework for Multi-Task Cross-Lingual Transfer",
            "Pfeiffer et al.",
            2020,
            "https://arxiv.org/abs/2005.00052",
        ),
        Paper(
            "AdapterFusion: Non-Destructive Task Composition for Transfer Learning",
            "Pfeiffer et al.",
            2020,
            "https://arxiv.org/abs/2005.00247",
        ),
    )
    known = (
        "Its authors report state-of-the-art transfer between languages in named entity recognition and causal "
        "commonsense reasoning (MAD-X), and better results than full fine-tuning and multi-task learning on 16 tasks "
        "when several are fused (AdapterFusion)."
    )
    hosts = ("module",)
    targets = "blocks"
    starts_as_base = False
    small = dict(size=3)
    adapter_hub = bottleneck(
        "output_adapter", mh_adapter=False, output_adapter=True, is_parallel=False, original_ln_before=True, scaling=1.0
    )

    def __init__(
        self,
        site,
        *,
        size: Annotated[int, "features of the bottleneck", Range(1)] = 48,
        activation: Annotated[Literal["gelu", "relu", "silu", "tanh"], "between the two maps"] = "relu",
    ):
        super().__init__(site, size, activation)
        for layer in (self.down, self.up):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.after_norm = kind_of(site.module) == "norm"
        self.passes_x = not self.after_norm

    @classmethod
    def places(cls, model, path, module):
        """The last norm of a block that ends with one, as BERT names it."""
        norms = [
            (f"{path}.{n}", m) for n, m in module.named_modules() if n in ("output.LayerNorm", "output_layer_norm")
        ]
        return norms or [(path, module)]

    def forward(self, inner, *args, **kwargs):
        if self.after_norm:
            (x,) = args
            return inner(x + self.branch(inner(x), *self.prepared(inner, x.dtype)))
        return super().forward(inner, *args, **kwargs)
