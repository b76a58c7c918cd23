"""GLoRA's layer-wise search: One-for-All: Generalized LoRA for Parameter-Efficient Fine-tuning. Chavan et al., 2023."""

import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from torch import Tensor

from ....core.hyper import Range
from ....core.recipe import Recipe
from ....core.targets import resolve
from .. import SinglePath
from ..mixed import Choice, Space
from ..supernet import Member

Kinds = tuple[str, ...]
_KINDS: dict[str, Kinds] = {
    "a": ("lora", "vector", "constant", "none"),
    "b": ("lora", "vector", "constant", "none"),
    "c": ("lora", "vector", "none"),
    "d": ("constant", "none", "vector"),
    "e": ("constant", "none", "vector"),
}


class Supports(Space):
    """A kind for each of the tensors A to E, each drawn, mutated and crossed by itself.

    What is smaller than a product `down` `up` is a part of `down`: a vector its first column, a constant the first
    entry of that.
    """

    def __init__(self, rank: int, biased: bool):
        made = itertools.product(*_KINDS.values())
        self.kinds = [k for k in made if any(kind != "none" for kind in (k if biased else k[:2]))]
        super().__init__([None, *(Recipe.of("glora", rank=rank, **dict(zip(_KINDS, k))) for k in self.kinds)])
        self.numbers = {kinds: k for k, kinds in enumerate(self.kinds, 1)}

    def mutate(self, choice: Choice, rng: random.Random, chance: float) -> Choice:
        """Each tensor of each site draws anew with this probability."""
        every = list(_KINDS.values())
        return tuple(
            self._number(
                [rng.choice(kinds) if rng.random() < chance else now for kinds, now in zip(every, self._at(k))]
            )
            for k in choice
        )

    def cross(self, one: Choice, other: Choice, rng: random.Random) -> Choice:
        """Each tensor of each site from one of the two."""
        return tuple(
            self._number([rng.choice(pair) for pair in zip(self._at(j), self._at(k))]) for j, k in zip(one, other)
        )

    def part(self, whole: Mapping[str, Tensor], name: str, shape: torch.Size) -> Tensor:
        if name in whole:
            return super().part(whole, name, shape)
        down = whole[f"{name}_down"]
        return down[:, :1] if len(shape) == 2 else down[0, :1]

    def _at(self, k: int) -> Kinds:
        return self.kinds[k - 1] if k else ("none",) * len(_KINDS)

    def _number(self, kinds: Sequence[str]) -> int:
        return self.numbers.get(tuple(kinds), 0)


class GLoRA(SinglePath):
    """What GLoRA changes at each matrix: W' = W + W * A + B and b' = b + b * D + E + W C, with A to E of any kind.

    A and B are a product of rank `rank`, a vector, a constant or nothing, C a product, a vector or nothing, D and E a
    vector, a constant or nothing, by itself at every matrix. Smaller kinds are parts of the product. A step trains one
    path, drawn evenly; evolution with the inherited weights follows, under the cap.

    As in the authors' code (github.com/Arnav0400/ViT-Slim, GLoRA).
    """

    name = "glora"

    def __init__(
        self,
        *,
        rank: Annotated[int, "rank of the products", Range(1)] = 4,
        targets: Annotated[Any, "matrices to adapt"] = "all-linear",
    ):
        self.rank, self.targets = rank, targets

    def members(self, base):
        biased = all(host.bias is not None for _, host in resolve(base.model, self.targets))
        return {"glora": Member(Supports(self.rank, biased), self.targets)}
