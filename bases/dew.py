"""Pre-train `dew`, a small diffusion model, on the train images of the task `digits`, and measure it.

    python bases/dew.py --output runs/dew --publish

It sees the images of the digits 0 to 7 in the train split of the task with its default seed; 8 and 9 are left to
adaptation. Every other image is bent a little. The objective is flow matching on straight paths: one loss without
weights or a schedule of noise to choose, and a flow that a sampler follows in few steps.
"""

import sys
from typing import Any

import torch
from torch import nn

import pictures
from graft.bases.dew import DewConfig, DewForImageGeneration
from graft.training.objectives.flow_matching import dropped, fixed, flow_loss, random

KNOWN = 8  # digits from 0 that it is trained on
SIZES = dict(hidden_size=96, num_hidden_layers=4, num_attention_heads=4, intermediate_size=384)


def build(seed: int = 0, **sizes: Any) -> DewForImageGeneration:
    torch.manual_seed(seed)
    names = {i: str(i) for i in range(10)}
    return DewForImageGeneration(DewConfig(**(SIZES | sizes), id2label=names, label2id={v: k for k, v in names.items()}))


def train(options: Any, batch: int = 128, **sizes: Any) -> tuple[DewForImageGeneration, list[dict[str, float]]]:
    """The model, trained as `options` say, and the records of the run."""
    model = build(options.seed, **sizes)
    (images, labels), (held, right) = (
        (x[y < KNOWN], y[y < KNOWN]) for x, y in map(pictures.digits, ("train", "validation"))
    )

    def loss(model: nn.Module, draw: torch.Generator) -> torch.Tensor:
        rows = pictures.some(images, batch, draw)
        seen, bent = images[rows], torch.arange(batch) % 2 == 0
        seen[bent] = pictures.warped(seen[bent], draw, degrees=8, shear=0.1, scale=0.08, shift=0.3, elastic=0.15)
        said = dropped(labels[rows], model.config, draw)
        place = options.device
        return flow_loss(model, seen.to(place), said.to(place), *(d.to(place) for d in random(seen, draw))).mean()

    def held_out(model: nn.Module) -> float:
        seen, said = held.to(options.device), right.to(options.device)
        return float(torch.stack([flow_loss(model, seen, said, *draw) for draw in fixed(seen)]).mean())

    records = pictures.train(model, loss, held_out, steps=options.steps, folder=options.output, seed=options.seed,
                             learning_rate=1e-3, average=0.998, device=options.device)  # fmt: skip
    return model, records


def main(args: list[str]) -> None:
    parser = pictures.arguments((__doc__ or "").split("\n")[0], steps=4000)
    options = parser.parse_args(args)
    model, records = train(options)
    print(records[-1])


if __name__ == "__main__":
    main(sys.argv[1:])
