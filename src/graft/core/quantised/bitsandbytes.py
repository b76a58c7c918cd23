"""bitsandbytes: Linear4bit (fp4 and nf4) and Linear8bitLt."""

import copy
import importlib
from typing import Any

from torch import nn

from ..sites.quantised import QuantisedSite
from . import SCHEMES, Scheme


def _functional() -> Any:
    return importlib.import_module("bitsandbytes.functional")


class Linear4bitSite(QuantisedSite, hosts=("bitsandbytes.nn.modules.Linear4bit",)):
    """Two weights a byte, blocks of 64 with a scale each, the scales quantised again or not.

    On CPUs with bfloat16 instructions the module packs its codes anew for its first inference, with scales rounded to
    bfloat16, and cannot be trained through from then on. While adapters are on the model it is kept from doing so, and
    what was packed before is unpacked as for a state dict.
    """

    def _unpacked(self):
        own = self.module.weight
        state = own.quant_state
        if not getattr(state, "packing_format_for_cpu", False):
            return own.data, state
        return _functional()._convert_weight_packed_for_cpu_inverse(own.data, copy.deepcopy(state))

    def open(self):
        host = self.module
        host.weight.data, host.weight.quant_state = self._unpacked()
        self.packs = getattr(host, "support_avx512bf16_for_cpu", False)
        if self.packs:
            host.support_avx512bf16_for_cpu = False

    def close(self):
        if self.packs:
            self.module.support_avx512bf16_for_cpu = True

    def decode(self):
        data, state = self._unpacked()
        return data if state is None else _functional().dequantize_4bit(data, state)

    def codes(self):
        bias = self.module.bias
        return {"weight": self._unpacked()[0]} | ({} if bias is None else {"bias": bias})


class Linear8bitLtSite(QuantisedSite, hosts=("bitsandbytes.nn.modules.Linear8bitLt",)):
    """int8 [out, in] with a scale a row, which the module takes over from its weight when it first runs."""

    def decode(self):
        own, state = self.module.weight, self.module.state
        scale = state.SCB if own.SCB is None else own.SCB
        return own.data if scale is None else _functional().int8_vectorwise_dequant(own.data, scale)


def _nf4(linear: nn.Linear) -> nn.Module:
    kind: Any = importlib.import_module("bitsandbytes.nn").Linear4bit
    made = kind(
        linear.in_features, linear.out_features, linear.bias is not None, compute_dtype=linear.weight.dtype,
        quant_type="nf4", compress_statistics=True,
    )  # fmt: skip
    made.load_state_dict(linear.state_dict())
    return made.to(linear.weight.device)  # which is when it quantises


SCHEMES["nf4"] = Scheme(
    "bitsandbytes': weights as NormalFloat4, 64 to a scale, scales quantised, as in QLoRA", _nf4, "bitsandbytes"
)
