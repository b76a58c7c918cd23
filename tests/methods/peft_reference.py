"""Hugging Face PEFT as a reference: one adapted layer in float64, with tensors of our choosing."""

import copy

from torch import nn


class Host(nn.Module):
    def __init__(self, host):
        super().__init__()
        self.host = host

    def forward(self, x):
        return self.host(x)


def peft_layer(host: nn.Module, config) -> nn.Module:
    """A copy of the layer `host` with PEFT's adapter on it; `config.target_modules` is set here."""
    import peft

    config.target_modules = ["host"]
    model = peft.get_peft_model(Host(copy.deepcopy(host)), config)
    return model.to(next(host.parameters()).dtype).base_model.model.host
