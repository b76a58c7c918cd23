"""Pre-train `sprout`, a small vision transformer, on the train images of the task `digits`, and measure it.

    python bases/sprout.py --output runs/sprout --publish

Two ways to learn are tried, and the one that is published gives a linear classifier of all ten digits the most
accuracy on the validation images. Each sees nothing but train images of the task with its default seed, augmented:

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
from transformers import ViTConfig, ViTForImageClassification, ViTModel

import graft
import pictures
from graft import tasks
from pictures import processor
from publish import publish

TEMPERATURE, KNOWN = 0.2, 5
SIZES = dict(image_size=8, patch_size=2, num_channels=1, hidden_size=96, num_hidden_layers=5, num_attention_heads=4,
             intermediate_size=384)  # fmt: skip


def view(images: Tensor, draw: torch.Generator) -> Tensor:
    """The images as another hand, pen and scanner might have given them."""
    bent = pictures.warped(images, draw, degrees=20, shear=0.3, scale=0.2, shift=1, elastic=0.4)
    return pictures.recoloured(bent, draw, contrast=0.5, noise=0.3)


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
        names = {i: str(i) for i in range(KNOWN)}
        config.id2label, config.label2id = names, {name: i for i, name in names.items()}
        self.whole = ViTForImageClassification(config)
        self.encoder = self.whole.vit

    def loss(self, images: Tensor, labels: Tensor, draw: torch.Generator) -> Tensor:
        place = next(self.parameters()).device
        return F.cross_entropy(self.whole(view(images, draw).to(place)).logits, labels.to(place))


OBJECTIVES = {"labels": Labels, "contrastive": Contrastive}


def build(objective: str, seed: int = 0, **sizes: Any) -> Any:
    """What is trained, with the encoder inside."""
    torch.manual_seed(seed)
    return OBJECTIVES[objective](ViTConfig(**(SIZES | sizes)))


def train(
    objective: str,
    folder: Path,
    *,
    steps: int,
    until: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    batch: int = 64,
    **sizes: Any,
) -> tuple[Any, list[dict[str, float]]]:
    """What `build` gives, trained for one of the `OBJECTIVES`, and the records of the run, see `pictures.train`."""
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
        model, loss, held_out, steps=steps, until=until, folder=folder, seed=seed, learning_rate=1e-3, device=device
    )  # fmt: skip
    return model, records


def bare(encoder: ViTModel) -> ViTModel:
    """The encoder alone, as transformers makes it, its weights rounded to bfloat16."""
    plain = ViTModel(ViTConfig(**SIZES | {k: getattr(encoder.config, k) for k in SIZES}), add_pooling_layer=False)
    plain.load_state_dict(encoder.state_dict())
    return plain.bfloat16().float().eval()


def checkpoint(model: Any) -> ViTForImageClassification:
    """What is published: the encoder below the classifier of the labels that it learnt, or below none."""
    if isinstance(model, Labels):
        return model.whole
    plain = ViTForImageClassification(ViTConfig(**SIZES, num_labels=0))
    plain.vit.load_state_dict(bare(model.encoder).state_dict())
    return plain


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
    """Accuracy on the validation and the test images of encoder and classifier, trained on the train images.

    10 passes, AdamW, learning rate 3e-4; the weights of the pass that is best on the validation images.
    """
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(**SIZES, num_labels=10))
    model.vit.load_state_dict(encoder.state_dict())
    rows = {split: tasks.load("digits", split=split) for split in tasks.SPLITS}
    options = {"objective": "image-classification", "processor": processor()}
    found = graft.fit(
        model, rows["train"], validation=rows["validation"], epochs=10, batch_size=32, learning_rate=3e-4, **options
    )  # fmt: skip
    test = graft.evaluate(model, rows["test"], **options)
    return {"validation": found.metrics["accuracy"], "test": test["accuracy"]}


def main(args: list[str]) -> None:
    parser = pictures.arguments((__doc__ or "").split("\n")[0], steps=3000)
    parser.add_argument("--objective", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES), help="ways to try")
    options = parser.parse_args(args)
    runs = {name: train(name, options.output / name, **pictures.plan(options)) for name in options.objective}
    encoders = {name: bare(model.encoder) for name, (model, _) in runs.items()}
    encoders |= {f"untrained, seed {seed}": bare(build("contrastive", seed).encoder) for seed in range(3)}
    encode = {name: lambda images, e=encoder: features(e, images) for name, encoder in encoders.items()}
    encode["pixels"] = lambda images: images.flatten(1).numpy()
    all_labels, few = ({name: probe(e, each) for name, e in encode.items()} for each in (None, 10))
    best = max(runs, key=lambda name: (all_labels[name]["validation"], few[name]["validation"]))
    tuned = {name: fine_tuned(encoders[name]) for name in (best, "untrained, seed 0")}
    figures = {"linear probe": all_labels, "linear probe, 10 labels a digit": few, "full fine-tuning": tuned}
    measured = {
        f"{figure}, {split}": {name: found[split] for name, found in by.items()}
        for figure, by in figures.items()
        for split in ("validation", "test")
    }
    pictures.show(measured)
    if options.publish:
        images = (
            "the images of digits 0 to 4 among the 1,197 train images" if best == "labels" else "1,197 train images"
        )
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
        print(publish("sprout", checkpoint(runs[best][0]), processor(), card | {"licence": "Apache-2.0"}))


if __name__ == "__main__":
    main(sys.argv[1:])
