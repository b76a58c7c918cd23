"""Pre-train `sprout`, a small vision transformer, on the train images of the task `digits`, and measure it.

    python bases/sprout.py --output runs/sprout --publish

Three ways to learn are tried, and the one that is published gives a linear classifier of all ten digits the most
accuracy on the validation images. Each sees nothing but train images of the task with its default seed, augmented:

masked       Masked image modelling: half of the patches are replaced by one learnt vector, and a linear layer gives
             their pixels back; the loss is the mean absolute error on them (SimMIM: A Simple Framework for Masked Image
             Modeling, Xie et al., 2021, https://arxiv.org/abs/2111.09886)
contrastive  Two augmented views of an image shall be more alike than those of others: cross entropy of the cosines of
             an MLP over the class token, divided by 0.2 (A Simple Framework for Contrastive Learning of Visual
             Representations, Chen et al., 2020, https://arxiv.org/abs/2002.05709)
labels       Cross entropy of the labels of the digits 0 to 4; the other images are left out
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification, ViTForMaskedImageModeling, ViTImageProcessor, ViTModel

import graft
import pictures
from graft import tasks
from publish import publish

TEMPERATURE, KNOWN = 0.2, 5
SIZES = dict(image_size=8, patch_size=2, num_channels=1, hidden_size=96, num_hidden_layers=5, num_attention_heads=4,
             intermediate_size=384, encoder_stride=2)  # fmt: skip


def view(images: Tensor, draw: torch.Generator) -> Tensor:
    """The images as another hand, pen and scanner might have given them."""
    bent = pictures.warped(images, draw, degrees=20, shear=0.3, scale=0.2, shift=1, elastic=0.4)
    return pictures.recoloured(bent, draw, contrast=0.5, noise=0.3)


class Masked(nn.Module):
    """What `masked` trains, around the encoder."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.whole = ViTForMaskedImageModeling(config)
        self.encoder = self.whole.vit

    def loss(self, images: Tensor, labels: Tensor, draw: torch.Generator) -> Tensor:
        patches = self.encoder.embeddings.patch_embeddings.num_patches
        hidden = torch.rand(len(images), patches, generator=draw).argsort(1) < patches // 2
        place = next(self.parameters()).device
        return self.whole(view(images, draw).to(place), bool_masked_pos=hidden.to(place)).loss


class Contrastive(nn.Module):
    """What `contrastive` trains, around the encoder."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.encoder, width = ViTModel(config, add_pooling_layer=False), config.hidden_size
        self.head = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, 64))

    def loss(self, images: Tensor, labels: Tensor, draw: torch.Generator) -> Tensor:
        views = torch.cat([view(images, draw), view(images, draw)]).to(next(self.parameters()).device)
        rows = F.normalize(self.head(self.encoder(views).last_hidden_state[:, 0]), dim=-1)
        alike = (rows @ rows.T / TEMPERATURE).fill_diagonal_(-torch.inf)
        partner = torch.arange(len(rows), device=rows.device).roll(len(images))
        return F.cross_entropy(alike, partner)


class Labels(nn.Module):
    """What `labels` trains, around the encoder."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        config.num_labels = KNOWN
        self.whole = ViTForImageClassification(config)
        self.encoder = self.whole.vit

    def loss(self, images: Tensor, labels: Tensor, draw: torch.Generator) -> Tensor:
        place = next(self.parameters()).device
        return F.cross_entropy(self.whole(view(images, draw).to(place)).logits, labels.to(place))


OBJECTIVES = {"masked": Masked, "contrastive": Contrastive, "labels": Labels}


def build(objective: str, seed: int = 0, **sizes: Any) -> Any:
    """What is trained, with the encoder inside."""
    torch.manual_seed(seed)
    return OBJECTIVES[objective](ViTConfig(**(SIZES | sizes)))


def train(
    objective: str, folder: Path, *, steps: int, seed: int = 0, device: str = "cpu", batch: int = 64, **sizes: Any
) -> tuple[ViTModel, list[dict[str, float]]]:
    """The encoder, trained for one of the `OBJECTIVES`, and the records of the run, see `pictures.train`."""
    model = build(objective, seed, **sizes)
    images, held = pictures.digits("train"), pictures.digits("validation")
    if objective == "labels":
        images, held = ((x[y < KNOWN], y[y < KNOWN]) for x, y in (images, held))

    def loss(model: nn.Module, draw: torch.Generator) -> Tensor:
        rows = pictures.some(images[0], batch, draw)
        return model.loss(images[0][rows], images[1][rows], draw)

    def held_out(model: nn.Module) -> float:
        draw = torch.Generator().manual_seed(1)
        rows = [pictures.some(held[0], batch, draw) for _ in range(4)]
        return float(torch.stack([model.loss(held[0][r], held[1][r], draw) for r in rows]).mean())

    records = pictures.train(
        model, loss, held_out, steps=steps, folder=folder, seed=seed, learning_rate=1e-3, device=device
    )  # fmt: skip
    return bare(model.encoder), records


def bare(encoder: ViTModel) -> ViTModel:
    """The encoder alone, as transformers makes it: without a mask token, its weights rounded to bfloat16."""
    plain = ViTModel(ViTConfig(**SIZES | {k: getattr(encoder.config, k) for k in SIZES}), add_pooling_layer=False)
    plain.load_state_dict({k: v for k, v in encoder.state_dict().items() if "mask_token" not in k})
    return plain.bfloat16().float().eval()


def processor() -> Any:
    """Grey images of any size as 8 x 8 pixels from -1 to 1."""
    return ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.5])


@torch.no_grad()
def features(encoder: ViTModel, images: Tensor) -> np.ndarray:
    """What a classifier of transformers reads: the class token after the last norm, [n, hidden_size]."""
    return encoder.eval()(images).last_hidden_state[:, 0].float().numpy()


def probe(encode: Any, each: int | None = None) -> dict[str, float]:
    """Accuracy on the validation and the test images of a linear classifier of `encode(images)`.

    Logistic regression on standardised features of the train images, or of the first `each` ones of every digit; of
    its C of 0.01, 0.1, 1, 10, 100 the one is taken that is best on the validation images.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    (x, y), held, test = ((encode(images), digits.numpy()) for images, digits in map(pictures.digits, tasks.SPLITS))
    rows = np.concatenate([np.flatnonzero(y == digit)[:each] for digit in range(10)])
    found = []
    for c in (0.01, 0.1, 1, 10, 100):
        fitted = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=2000)).fit(x[rows], y[rows])
        found.append((fitted.score(*held), -c, fitted))
    best = max(found)
    return {"validation": best[0], "test": best[2].score(*test)}


def fine_tuned(encoder: ViTModel) -> dict[str, float]:
    """Accuracy on the validation and the test images of the whole encoder trained with a classifier on the train images.

    20 passes, AdamW, learning rate 3e-4; the weights of the pass that is best on the validation images.
    """
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(**SIZES, num_labels=10))
    model.vit.load_state_dict(encoder.state_dict())
    rows = {split: tasks.load("digits", split=split) for split in tasks.SPLITS}
    options = {"objective": "image-classification", "processor": processor()}
    found = graft.fit(
        model, rows["train"], validation=rows["validation"], epochs=20, batch_size=32, learning_rate=3e-4, **options
    )  # fmt: skip
    test = graft.evaluate(model, rows["test"], **options)
    return {"validation": found.metrics["accuracy"], "test": test["accuracy"]}


def main(args: list[str]) -> None:
    options = pictures.arguments((__doc__ or "").split("\n")[0], steps=3000).parse_args(args)
    how = dict(steps=options.steps, seed=options.seed, device=options.device)
    runs = {name: train(name, options.output / name, **how) for name in OBJECTIVES}
    encoders = {name: encoder for name, (encoder, _) in runs.items()}
    encoders |= {f"untrained, seed {seed}": bare(build("contrastive", seed).encoder) for seed in range(3)}
    encode = {name: lambda images, e=encoder: features(e, images) for name, encoder in encoders.items()}
    encode["pixels"] = lambda images: images.flatten(1).numpy()
    all_labels, few = ({name: probe(e, each) for name, e in encode.items()} for each in (None, 10))
    best = max(OBJECTIVES, key=lambda name: (all_labels[name]["validation"], few[name]["validation"]))
    tuned = {name: fine_tuned(encoders[name]) for name in (best, "untrained, seed 0")}
    figures = {"linear probe": all_labels, "linear probe, 10 labels a digit": few, "full fine-tuning": tuned}
    measured = {
        f"{figure}, {split}": {name: found[split] for name, found in by.items()}
        for figure, by in figures.items()
        for split in ("validation", "test")
    }
    pictures.show(measured)
    if options.publish:
        images = "the images of digits 0 to 4 among the 1,197 train images" if best == "labels" else "1,197 train images"
        card = {
            "summary": "A small vision transformer pre-trained on handwritten digits of 8 x 8 pixels.",
            "kind": "image-encoder",
            "training": {
                "recipe": "bases/sprout.py", "objective": best, "images a step": 64,
                **pictures.facts(runs[best][1], options),
            },
            "data": [pictures.source(f"{images} of the task digits, seed 0, augmented, no validation or test image")],
            "measured": measured,
            "curve": pictures.curve(runs[best][1]),
        }  # fmt: skip
        print(publish("sprout", encoders[best], processor(), card | {"licence": "Apache-2.0"}))


if __name__ == "__main__":
    main(sys.argv[1:])
