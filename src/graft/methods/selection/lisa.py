"""LISA: Layerwise Importance Sampling for Memory-Efficient Large Language Model Fine-Tuning. Pan et al., 2024."""

from typing import Annotated

import torch

from ...core.delta import Paper
from ...core.errors import GraftError
from ...core.hyper import Range
from ..weight.full import Full


class LISA(Full, name="lisa"):
    """y' = m(x), m a trained copy of each target, so W' = V for each matrix W [out, in]; few blocks learn at once.

    Every `interval` steps `layers` of the blocks (targets that are modules of several layers) are drawn uniformly. The
    other blocks rest: they get no gradient, and their state in the optimizer is dropped. Embeddings, the output head
    and all other targets always learn. What was learnt stays when a block rests. The memory of optimizer and gradients
    is that of `layers` blocks; the copies beside the frozen base take that of all targets.

    From the code of LMFlow (lisa_trainer.py and args.py, with the defaults), which draws with equal probability and
    leaves the state of resting layers in the optimizer.
    """

    papers = (
        Paper(
            "LISA: Layerwise Importance Sampling for Memory-Efficient Large Language Model Fine-Tuning",
            "Pan et al.",
            2024,
            "https://arxiv.org/abs/2403.17919",
        ),
    )
    known = (
        "Its authors report 11 to 37 % more than LoRA on MT-Bench with as much memory or less, and with LLaMA-2-70B "
        "results equal to LoRA's or better on MT-Bench, GSM8K and PubMedQA."
    )
    targets = ("embeddings", "blocks", "head")
    lycoris = None
    small = dict(layers=1)
    key: torch.Tensor
    steps: torch.Tensor
    number: torch.Tensor
    count: torch.Tensor

    @classmethod
    def plan(cls, sites, hypers):
        blocks = [site for site in sites if site.kind == "module"]
        key = torch.randint(2**31, ())
        for i, site in enumerate(blocks):
            if (layers := hypers[site.path]["layers"]) > len(blocks):
                raise GraftError(f"lisa: layers must be at most the {len(blocks)} blocks of the targets, not {layers}")
            site.stats = site.stats | {"draw": (key, i, len(blocks))}
        return hypers

    def __init__(
        self,
        site,
        *,
        layers: Annotated[int, "blocks that learn at a time", Range(1)] = 2,
        interval: Annotated[int, "steps until blocks are drawn again", Range(1)] = 20,
    ):
        super().__init__(site)
        self.layers, self.interval = layers, interval
        if site.kind == "module":
            key, number, count = site.stats.get("draw", (0, 0, 0))
            for name, value in {"key": key, "number": number, "count": count, "steps": 0}.items():
                self.register_buffer(name, torch.as_tensor(value))
            self.loaded()

    def loaded(self):
        """Rest unless among the blocks of the present draw, which the tensors decide."""
        if self.site.kind == "module":
            draw = torch.Generator().manual_seed(int(self.key) + int(self.steps) // self.interval)
            awake = torch.randperm(int(self.count), generator=draw)[: self.layers].tolist()
            self.resting = int(self.number) not in awake

    @classmethod
    def step(cls, deltas, progress):
        blocks = [d for d in deltas if d.site.kind == "module"]
        fresh = {}
        for d in blocks:
            if d.resting:
                fresh |= dict.fromkeys(d.copy.parameters())
            d.steps += 1
            d.loaded()
        return fresh
