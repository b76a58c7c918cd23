"""What the recipes of the image models share: augmentation, and a run that is stopped and goes on."""

import json

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("sklearn")

import dew
import pictures
import sprout


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_images_are_those_of_the_task_and_of_scikit_learn():
    from sklearn.datasets import load_digits

    sizes = {split: len(pictures.digits(split)[0]) for split in ("train", "validation", "test")}
    assert sizes == {"train": 1197, "validation": 240, "test": 360}
    images, labels = pictures.digits("train")
    known = {tuple(row) for row in (load_digits().images.reshape(-1, 64)).round().astype(int).tolist()}
    back = ((images + 1) * 8).round().int().flatten(1)
    assert {tuple(row) for row in back.tolist()} <= known and images.min() == -1 and images.max() == 1
    assert len(dew.known("train")[1]) == (labels < 8).sum() and dew.known("train")[1].max() == 7


def test_without_limits_nothing_changes():
    images = torch.rand(20, 1, 8, 8) * 2 - 1
    torch.testing.assert_close(pictures.warped(images, seeded()), images, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(pictures.recoloured(images, seeded()), images, atol=1e-6, rtol=1e-6)


def centres(images):
    """Of mass, [n, 2] in pixels from the middle, to the right and down."""
    mass, along = (images + 1)[:, 0], torch.arange(8) - 3.5
    return torch.stack([(mass.sum(1) * along).sum(1), (mass.sum(2) * along).sum(1)], 1) / mass.sum((1, 2))[:, None]


def test_a_shift_moves_by_what_is_said_and_a_rotation_about_the_middle():
    spot = F.pad(torch.full((400, 1, 2, 2), 2.0), (4, 2, 3, 3)) - 1  # at (1, 0) from the middle
    moved = centres(pictures.warped(spot, seeded(), shift=1.5)) - centres(spot)
    assert moved.abs().max() <= 1.5 + 1e-4
    assert moved.std(0).tolist() == pytest.approx([1.5 / 3**0.5] * 2, rel=0.1)  # an even distribution
    turned = centres(pictures.warped(spot, seeded(), degrees=30))
    angles = torch.rad2deg(torch.atan2(turned[:, 1], turned[:, 0]))
    assert angles.abs().max() < 33 and angles.std() == pytest.approx(30 / 3**0.5, rel=0.2)
    assert (turned.norm(dim=1) - 1).abs().max() < 0.15


def test_contrast_and_noise_have_their_limits():
    images = torch.where(torch.arange(64).view(8, 8) % 2 == 0, 1.0, -1.0).expand(300, 1, 8, 8)
    faded = pictures.recoloured(images, seeded(), contrast=0.4)
    white = (faded[:, 0, 0, 0] + 1) / 2
    assert (faded[:, 0, 0, 1] == -1).all() and 0.6 <= white.min() < 0.65 and 0.95 < white.max() <= 1
    grey = torch.zeros(300, 1, 8, 8)
    spread = pictures.recoloured(grey, seeded(), noise=0.2).flatten(1).std(1)
    assert spread.max() < 0.27 and spread.min() < 0.02 and spread.mean() == pytest.approx(0.1, rel=0.15)


class Stopped(Exception):
    pass


SMALL = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)


@pytest.mark.parametrize("recipe", ["labels", "contrastive", "dew"])
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(pictures.train, "__kwdefaults__", pictures.train.__kwdefaults__ | {"every": 3})

    def run(folder, **options):
        train = dew.train if recipe == "dew" else lambda *a, **k: sprout.train(recipe, *a, **k)
        return train(folder, steps=8, batch=6, **options, **SMALL)

    def killed(*args):
        save(*args)
        raise Stopped

    straight, records = run(tmp_path / "straight")
    save = pictures.checkpoints.save
    run(tmp_path / "stopped", until=3)
    monkeypatch.setattr(pictures.checkpoints, "save", killed)
    with pytest.raises(Stopped):
        run(tmp_path / "stopped")
    monkeypatch.setattr(pictures.checkpoints, "save", save)
    resumed, again = run(tmp_path / "stopped")
    assert [r["step"] for r in records] == [3, 6, 8]
    assert [{**r, "seconds": 0} for r in again] == [{**r, "seconds": 0} for r in records]
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))
    lines = (tmp_path / "stopped" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == again
    finished, _ = run(tmp_path / "stopped")
    assert all(torch.equal(a, b) for a, b in zip(finished.parameters(), resumed.parameters(), strict=True))


def test_the_seed_decides(tmp_path):
    runs = [dew.train(tmp_path / str(i), steps=2, batch=4, seed=seed, **SMALL)[0] for i, seed in enumerate((0, 0, 1))]
    bits = [torch.cat([p.flatten() for p in model.parameters()]) for model in runs]
    assert torch.equal(bits[0], bits[1]) and not torch.equal(bits[0], bits[2])


def test_views_of_one_image_are_partners():
    """The contrastive loss is that of log softmax over all others, by hand."""
    model = sprout.build("contrastive", **SMALL)
    images, labels = pictures.digits("validation")
    with torch.no_grad():
        loss = model.loss(images[:4], labels[:4], seeded(3))
        draw = seeded(3)
        views = [sprout.view(images[:4], draw) for _ in range(2)]
        rows = [F.normalize(model.head(model.encoder(v).last_hidden_state[:, 0]), dim=-1) for v in views]
    flat, total = torch.cat(rows), 0.0
    for i in range(8):
        alike = {j: float(flat[i] @ flat[j]) / sprout.TEMPERATURE for j in range(8) if j != i}
        others = torch.tensor(list(alike.values())).logsumexp(0)
        total += float(others) - alike[(i + 4) % 8]
    assert float(loss) == pytest.approx(total / 8, rel=1e-4)
