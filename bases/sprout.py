"""Pre-train `sprout`, a small vision transformer, on the train images of the task `digits`, and measure it.

    python bases/sprout.py --output runs/sprout --objective contrastive --publish

Three ways to learn before any task is known; each sees the train images of the task with its default seed only:

masked       Masked image modelling: half of the patches are replaced by one learnt vector, and a linear layer gives
             their pixels back; the loss is the mean absolute error on them (SimMIM: A Simple Framework for Masked Image
             Modeling, Xie et al., 2021, https://arxiv.org/abs/2111.09886)
contrastive  Two augmented views of an image shall be more alike than those of others: cross entropy of the cosines of
             an MLP over the class token, divided by 0.2 (A Simple Framework for Contrastive Learning of Visual
             Representations, Chen et al., 2020, https://arxiv.org/abs/2002.05709)
labels       Cross entropy of the labels of the digits 0 to 4, augmented; the other images are left out
"""

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification, ViTForMaskedImageModeling, ViTModel

import pictures

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
    return OBJECTIVES[objective](ViTConfig(**(SIZES | sizes), hidden_dropout_prob=0.0))


def train(objective: str, options: Any, batch: int = 64, **sizes: Any) -> tuple[ViTModel, list[dict[str, float]]]:
    """The encoder, trained as `options` say, and the records of the run."""
    model = build(objective, options.seed, **sizes)
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

    records = pictures.train(model, loss, held_out, steps=options.steps, folder=options.output, seed=options.seed,
                             learning_rate=1e-3, device=options.device)  # fmt: skip
    return bare(model.encoder), records


def bare(encoder: ViTModel) -> ViTModel:
    """The encoder alone, as transformers makes it: without a mask token."""
    plain = ViTModel(ViTConfig(**{k: getattr(encoder.config, k) for k in SIZES}), add_pooling_layer=False)
    plain.load_state_dict({k: v for k, v in encoder.state_dict().items() if "mask_token" not in k})
    return plain.eval()


@torch.no_grad()
def features(encoder: ViTModel, images: Tensor) -> Any:
    """What a classifier of transformers reads: the class token after the last norm, [n, hidden_size]."""
    return encoder.eval()(images).last_hidden_state[:, 0].float().numpy()


def probe(encode: Any, test: bool = False) -> float:
    """Accuracy on the validation images, or the test images, of a linear classifier of `encode(images)`.

    Logistic regression on standardised features of the train images; its C of 0.01, 0.1, 1, 10, 100 is the best one on
    the validation images.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    (x, y), (held, right), (last, truth) = ((encode(i), l) for i, l in map(pictures.digits, SPLITS))
    found = []
    for c in (0.01, 0.1, 1, 10, 100):
        fitted = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=2000)).fit(x, y)
        found.append((fitted.score(held, right), -c, fitted))
    best = max(found)
    return best[2].score(last, truth) if test else best[0]


SPLITS = ("train", "validation", "test")


def main(args: list[str]) -> None:
    parser = pictures.arguments((__doc__ or "").split("\n")[0], steps=4000)
    parser.add_argument("--objective", choices=OBJECTIVES, default="contrastive")
    options = parser.parse_args(args)
    encoder, records = train(options.objective, options)
    print(options.objective, records[-1], "probe", probe(lambda i: features(encoder, i)))


if __name__ == "__main__":
    main(sys.argv[1:])
