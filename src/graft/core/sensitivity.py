"""How much single entries of trained tensors matter to the loss, followed over training (AdaLoRA)."""

import torch
from torch import Tensor

from .delta import Delta


class Sensitive(Delta):
    """A delta that follows the score J U of each entry w of the tensors it names to `follow`.

    J comes from the sensitivity I = |w dL/dw|, smoothed, and U from the uncertainty of it,

        J <- beta1 J + (1 - beta1) I,    U <- beta2 U + (1 - beta2) |I - J|,

    with every `observe`. Both are buffers, sensitivity_NAME and uncertainty_NAME, in the shape of the tensor.
    """

    followed: tuple[str, ...] = ()

    def follow(self, names: tuple[str, ...], beta1: float, beta2: float) -> None:
        """Begin, with averages of zero; for the end of the constructor."""
        for name in names:
            for average in ("sensitivity", "uncertainty"):
                self.register_buffer(f"{average}_{name}", torch.zeros_like(self.get_parameter(name)))
        self.followed, self.beta1, self.beta2 = names, beta1, beta2

    @torch.no_grad()
    def observe(self) -> None:
        """Take in the gradients of a step."""
        for name in self.followed:
            p, j, u = (self.get_parameter(name), *self.averages(name))
            now = torch.zeros_like(p) if p.grad is None else (p * p.grad).abs()
            j.lerp_(now, 1 - self.beta1)
            u.lerp_((now - j).abs(), 1 - self.beta2)

    def averages(self, name: str) -> tuple[Tensor, Tensor]:
        """J and U of a tensor."""
        return self.get_buffer(f"sensitivity_{name}"), self.get_buffer(f"uncertainty_{name}")

    def scores(self) -> list[Tensor]:
        """J U of each tensor, in the order of `follow`."""
        return [j * u for j, u in map(self.averages, self.followed)]
