"""NOAH: Neural Prompt Search. Zhang, Zhou, Liu, 2022."""

import random
from collections.abc import Sequence
from typing import Annotated, Any

from ....core.recipe import Recipe
from .. import SinglePath
from ..mixed import Choice, Space
from ..supernet import Member, blocks

_SWITCH = 0.4  # how likely a mutation draws another depth


class Depths(Space):
    """A size for each of the first d blocks, nothing in the others; the first option is None."""

    def __init__(self, options: Sequence[Any], blocks: Sequence[str], depths: Sequence[int]):
        super().__init__(options, blocks)
        self.depths = depths

    def draw(self, count: int, rng: random.Random) -> Choice:
        return self._sized((), rng.choice(self.depths), count, rng)

    def mutate(self, choice: Choice, rng: random.Random, chance: float) -> Choice:
        """With this probability a new depth may be drawn: blocks that leave get nothing, those that join any size."""
        if rng.random() >= chance or rng.random() >= _SWITCH:
            return choice
        depth = rng.choice(self.depths)
        return self._sized(tuple(k for k in choice if k)[:depth], depth, len(choice), rng)

    def cross(self, one: Choice, other: Choice, rng: random.Random) -> Choice:
        """All sizes of one of the two."""
        return rng.choice((one, other))

    def _sized(self, first: Choice, depth: int, count: int, rng: random.Random) -> Choice:
        rest = (rng.randrange(1, len(self.options)) for _ in range(depth - len(first)))
        return (*first, *rest, *[0] * (count - depth))


class NOAH(SinglePath):
    """A prompt, a LoRA and an adapter of any size in the first blocks, as many as pays.

    Three adapters of the supernet: a prompt that the self-attention of a block reads (VPT), a LoRA of the fused or
    separate projections of queries, keys and values, W' = W + B A, and a serial adapter after the MLP. Each has a depth
    d, a share of the blocks, and a size of its own in each of the first d blocks; later blocks have none. Smaller sizes
    are the leading rows and columns of the largest. A step trains one path, drawn evenly; evolution with the inherited
    weights follows, under the cap.

    Sizes, depths, draws, mutation (which changes depths, and sizes of blocks that join), crossing and numbers are those
    of the authors' code (github.com/Davidzhangyuanhan/NOAH). There a prompt passes the norm of its block, what
    the last block with one makes of it goes on through those without, and the adapter has QuickGELU in place of GELU.
    """

    name = "noah"

    def __init__(
        self,
        *,
        sizes: Annotated[Sequence[int], "length of the prompt, rank of the LoRA, features of the adapter"] = (1, 5, 10),
        depths: Annotated[Sequence[float], "shares of the blocks"] = (0.25, 0.5, 0.75, 1.0),
    ):
        self.sizes, self.depths = sizes, depths

    def members(self, base):
        where = blocks(base.model)
        depths = sorted({max(1, round(share * len(where))) for share in self.depths})
        kinds = {
            "prompt": ([Recipe.of("vpt", length=n) for n in self.sizes], "attention"),
            "lora": ([Recipe.of("lora", rank=n, alpha=float(n)) for n in self.sizes], "qkv"),
            "adapter": ([Recipe.of("houlsby", size=n) for n in self.sizes], "mlp"),
        }
        return {name: Member(Depths([None, *some], where, depths), on) for name, (some, on) in kinds.items()}
