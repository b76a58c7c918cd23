"""Pre-train `dew`, a small diffusion model, on the train images of the task `digits`, and measure it.

    python bases/dew.py --output runs/dew --publish

It sees the images of the digits 0 to 7 in the train split of the task with its default seed; 8 and 9 are left to
adaptation. Every other image is bent a little. The objective is flow matching on straight paths: one loss without
weights or a schedule of noise to choose, and a flow that a sampler follows in few steps.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

import graft
import pictures
from graft import tasks
from graft.bases.dew import DewConfig, DewForImageGeneration
from graft.tasks import samples
from graft.training.objectives.flow_matching import dropped, fixed, flow_loss, random
from pictures import processor
from publish import publish

KNOWN, EACH = 8, 40  # digits from 0 that it is trained on; samples of each to judge it by
SIZES = dict(hidden_size=96, num_hidden_layers=4, num_attention_heads=4, intermediate_size=384)


def build(seed: int = 0, **sizes: Any) -> DewForImageGeneration:
    torch.manual_seed(seed)
    names = {i: str(i) for i in range(10)}
    return DewForImageGeneration(
        DewConfig(**(SIZES | sizes), id2label=names, label2id={v: k for k, v in names.items()})
    )


def known(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The images and digits of a split without 8 and 9."""
    images, labels = pictures.digits(split)
    return images[labels < KNOWN], labels[labels < KNOWN]


def train(
    folder: Path,
    *,
    steps: int,
    until: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    batch: int = 128,
    **sizes: Any,
) -> tuple[DewForImageGeneration, list[dict[str, float]]]:
    """The trained model, and the records of the run, see `pictures.train`."""
    model = build(seed, **sizes)
    (images, labels), (held, right) = known("train"), known("validation")
    held, right = held.to(device), right.to(device)

    def loss(model: Any, draw: torch.Generator) -> torch.Tensor:
        rows = pictures.some(images, batch, draw)
        seen, bent = images[rows], torch.arange(batch) % 2 == 0
        seen[bent] = pictures.warped(seen[bent], draw, degrees=8, shear=0.1, scale=0.08, shift=0.3, elastic=0.15)
        said = dropped(labels[rows], model.config, draw)
        return flow_loss(model, seen.to(device), said.to(device), *(d.to(device) for d in random(seen, draw))).mean()

    def held_out(model: nn.Module) -> float:
        return mean_loss(model, held, right)

    records = pictures.train(
        model, loss, held_out, steps=steps, until=until, folder=folder, seed=seed, learning_rate=1e-3, average=0.998,
        device=device,
    )  # fmt: skip
    return model, records


@torch.no_grad()
def mean_loss(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """The loss at fixed times and noises."""
    return float(torch.stack([flow_loss(model, images, labels, *draw) for draw in fixed(images)]).mean())


def measure(model: DewForImageGeneration) -> dict[str, dict[str, float]]:
    """The figures of the card, each with what an untrained network and real images give."""
    untrained, (images, labels), chosen = build(), known("test"), torch.arange(KNOWN).repeat_interleave(EACH)
    real, digits = known("train")
    first = torch.cat([(digits == digit).nonzero()[:EACH, 0] for digit in range(KNOWN)])
    drawn = {
        f"dew, guidance {g:g}": model.sample(chosen, guidance=g, generator=torch.Generator().manual_seed(0))
        for g in (1.0, 2.0)
    }
    drawn["untrained"] = untrained.sample(chosen, generator=torch.Generator().manual_seed(0))
    drawn["real train images"] = real[first]
    found = {name: samples.quality(x.numpy(), chosen.numpy()) for name, x in drawn.items()}
    rows = tasks.load("digits", split="test")
    old = rows.select([i for i, row in enumerate(rows) if int(row["label"]) < KNOWN])
    new = rows.select([i for i, row in enumerate(rows) if int(row["label"]) >= KNOWN])
    options = {"objective": "flow-matching", "processor": processor()}
    both = {"dew": model, "untrained": untrained}
    says = {"digits 0 to 7": old, "digits 8 and 9": new, "all digits": rows}
    right = {k: r.score(graft.predict(model, r, **options))["accuracy"] for k, r in says.items()}
    return {
        f"loss on test images of 0 to {KNOWN - 1}": {k: mean_loss(m, images, labels) for k, m in both.items()},
        "loss on test images of 8 and 9": {k: graft.evaluate(m, new, **options)["loss"] for k, m in both.items()},
        f"class accuracy of {len(chosen)} samples": {k: v["class_accuracy"] for k, v in found.items()},
        f"Fréchet distance of {len(chosen)} samples to real test images": {k: v["frechet"] for k, v in found.items()},
        "accuracy of the label of the least loss, test images": right,
        "accuracy of the judge on real test images": {
            "all digits": float(samples.judge().score(*samples.pixels(rows)))
        },
    }


def main(args: list[str]) -> None:
    options = pictures.arguments((__doc__ or "").split("\n")[0], steps=4000).parse_args(args)
    model, records = train(options.output, **pictures.plan(options))
    model = model.bfloat16().float()  # as it is published
    measured = measure(model)
    pictures.show(measured)
    if options.publish:
        what = (
            "the images of the digits 0 to 7 among the 1,197 train images of the task digits, seed 0, every other one "
        )
        card = {
            "summary": "A small class-conditional diffusion model that draws handwritten digits of 8 x 8 pixels.",
            "kind": "diffusion",
            "training": {
                "recipe": "bases/dew.py", "objective": "flow-matching", "images a step": 128,
                **pictures.facts(records, options),
            },
            "data": [pictures.source(f"{what}bent a little; no 8, no 9, no validation or test image")],
            "measured": measured,
            "curve": pictures.curve(records),
        }  # fmt: skip
        print(publish("dew", model, processor(), card | {"licence": "Apache-2.0"}))


if __name__ == "__main__":
    main(sys.argv[1:])
