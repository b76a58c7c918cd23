"""torchao: quantize_(model, Int8WeightOnlyConfig()) and the like, which give nn.Linear weights of their own types."""

import copy
import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..sites.quantised import QuantisedSite
from . import SCHEMES, Scheme


class TorchaoSite(QuantisedSite, hosts=("torchao.utils.TorchAOBaseTensor",)):
    """A weight [out, in] that knows how to decode itself, and seems to have the dtype that it had before."""

    @property
    def passes_gradient(self):
        """Seen by trying: where inputs are quantised as well, no gradient reaches them."""
        own = self.module.weight
        with torch.enable_grad():
            x = torch.zeros(1, self.d_in, dtype=own.dtype, device=own.device, requires_grad=True)
            return F.linear(x, own).requires_grad

    def decode(self):
        return self.module.weight.dequantize()

    def codes(self):
        own, bias = self.module.weight, self.module.bias
        found = {name: getattr(own, name) for name in own.__tensor_flatten__()[0]}
        return found if bias is None else found | {"bias": bias}


def _int8(linear: nn.Linear) -> nn.Module:
    library: Any = importlib.import_module("torchao.quantization")
    made = copy.deepcopy(linear)
    library.quantize_(made, library.Int8WeightOnlyConfig())
    return made


SCHEMES["int8-weights"] = Scheme("torchao's: weights as int8, a scale for each output", _int8, "torchao")
