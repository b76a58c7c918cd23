"""torch's own dynamic quantisation: torch.ao.quantization.quantize_dynamic(model, {nn.Linear})."""

import copy
import importlib
from typing import Any

import torch
from torch import nn

from ..sites.quantised import QuantisedSite
from . import SCHEMES, Scheme


class DynamicSite(QuantisedSite, hosts=("torch.ao.nn.quantized.dynamic.modules.linear.Linear",)):
    """Weights packed as int8 [out, in] with one scale, or as float16; inputs are rounded to int8 as they come.

    Packed weights are no parameters, and the product has no derivative.
    """

    passes_gradient = False
    dtype = torch.float32  # though its scales are float64

    @property
    def bias(self):
        own = self.module.bias()
        return own if own is None else own.detach()

    def decode(self):
        return self.module.weight().dequantize()

    def codes(self):
        own, bias = self.module.weight(), self.bias
        found = {"weight": own.int_repr() if own.is_quantized else own}
        if own.is_quantized:
            per_row = own.qscheme() in (torch.per_channel_affine, torch.per_channel_symmetric)
            found["scale"] = own.q_per_channel_scales() if per_row else torch.tensor(own.q_scale())
        return found if bias is None else found | {"bias": bias}


def _int8(linear: nn.Linear) -> nn.Module:
    own: Any = copy.copy(linear)
    own.qconfig = torch.ao.quantization.per_channel_dynamic_qconfig
    library: Any = importlib.import_module("torch.ao.nn.quantized.dynamic")
    return library.Linear.from_float(own)


SCHEMES["int8"] = Scheme(
    "torch's own: weights as int8, a scale for each output, and inputs as they come; float32, on CPUs", _int8,
    dtype=torch.float32, device="cpu",
)  # fmt: skip
