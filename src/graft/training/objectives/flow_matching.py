"""Image generation by flow matching."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..data import Examples
from . import on
from .images import LabelledImages

DRAWS, SEED = 8, 0  # fixed times and noises of an evaluation


class FlowMatching(LabelledImages):
    """The velocity of straight paths from noise to images of a label, by which a model draws such images.

        x(t) = (1 - t) noise + t image,   loss = mean over pixels of (v(x(t), t, label) - (image - noise))^2

    with v = model(pixel_values=x(t), time=t, labels=label). In training t is drawn evenly from 0 to 1, noise from a
    normal distribution, and a share `label_dropout` of the labels is replaced by `num_labels`, which stands for none;
    both numbers are in the model's configuration. Whatever is measured takes the mean over 8 fixed pairs of time and
    noise, the same for every image. A prediction is the label whose loss on the image is least, and its probability
    the softmax of -loss x pixels / 2 over the labels.

    Flow Matching for Generative Modeling. Lipman et al., 2022. https://arxiv.org/abs/2210.02747
    Your Diffusion Model is Secretly a Zero-Shot Classifier. Li et al., 2023. https://arxiv.org/abs/2303.16203
    """

    name = "flow-matching"
    auto = "AutoModelForImageGeneration"
    metrics = {"loss": False}
    classes = False

    def __init__(self, model: nn.Module, processor: Any = None, **options: Any):
        super().__init__(model, processor, **options)
        self.config: Any = model.config

    @classmethod
    def suits(cls, columns: Sequence[str], example: Mapping[str, Any], architecture: str = "") -> bool:
        """Only a model that is made for it learns from images in this way."""
        return super().suits(columns, example) and cls.made_for(architecture)

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        images, labels = batch["pixel_values"], batch["labels"]
        if model.training:
            losses = flow_loss(model, images, dropped(labels, self.config), *random(images))
        else:
            losses = torch.stack([flow_loss(model, images, labels, *draw) for draw in fixed(images)]).mean(0)
        return losses.sum(), losses

    def record(self, outputs: Tensor, batch: dict[str, Tensor]) -> dict[str, Any]:
        return {}

    def score(self, records: Sequence[dict[str, Any]], loss: float) -> dict[str, float]:
        return {"loss": loss}

    def predict(self, model: nn.Module, examples: Examples, **generation: Any) -> list[Any]:
        images = on(model, self.pixels_of(examples))["pixel_values"]
        kinds = torch.arange(len(self.labels or ()), device=images.device)
        many, labels = images.repeat_interleave(len(kinds), 0), kinds.repeat(len(images))
        losses = torch.stack([flow_loss(model, many, labels, *draw) for draw in fixed(many)]).mean(0)
        return self.named(-losses.view(len(images), -1) * images[0].numel() / 2)


def flow_loss(model: nn.Module, images: Tensor, labels: Tensor, time: Tensor, noise: Tensor) -> Tensor:
    """The loss of each image, [batch], at `time` [batch] and with `noise` like the images."""
    share = time[:, None, None, None]
    velocity = model(pixel_values=(1 - share) * noise + share * images, time=time, labels=labels)
    return (velocity.float() - (images - noise)).square().flatten(1).mean(1)


def random(images: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """A time and a noise for each image, from a generator of the CPU."""
    time, noise = (
        draw(shape, generator=generator) for draw, shape in ((torch.rand, len(images)), (torch.randn, images.shape))
    )
    return time.to(images.device), noise.to(images.device)


def fixed(images: Tensor) -> list[tuple[Tensor, Tensor]]:
    """`DRAWS` times, evenly spread, each with a noise that is the same for all images."""
    noise = torch.randn(DRAWS, *images.shape[1:], generator=torch.Generator().manual_seed(SEED)).to(images)
    return [(images.new_full((len(images),), (i + 0.5) / DRAWS), noise[i].expand_as(images)) for i in range(DRAWS)]


def dropped(labels: Tensor, config: Any, generator: torch.Generator | None = None) -> Tensor:
    """The labels with a share of them replaced by the one that stands for none."""
    lost = torch.rand(len(labels), generator=generator).to(labels.device) < config.label_dropout
    return labels.masked_fill(lost, config.num_labels)
