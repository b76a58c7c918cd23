"""sprout as it was published."""

import json

import pytest
import torch

import graft
from graft import bases, tasks

pytest.importorskip("sklearn")
pytest.importorskip("PIL")

import pictures
import sprout


@pytest.fixture(scope="module")
def encoder():
    from transformers import ViTModel

    return ViTModel.from_pretrained(bases.find("sprout").path(), add_pooling_layer=False, dtype=torch.float32).eval()


def test_its_features_are_far_better_than_untrained_ones(encoder):
    """A linear classifier with 10 labels a digit gets the published accuracy, and 10 points more than from those."""
    card = bases.find("sprout").card["measured"]
    found = sprout.probe(lambda images: sprout.features(encoder, images), 10)
    untrained = sprout.probe(lambda images: sprout.features(sprout.bare(sprout.build("labels").encoder), images), 10)
    best = bases.find("sprout").card["training"]["objective"]
    assert found["test"] == pytest.approx(card["linear probe, 10 labels a digit, test"][best], abs=0.006)
    assert found["test"] > untrained["test"] + 0.1


def test_it_gets_what_it_was_trained_on_from_pictures_of_every_kind():
    from PIL import Image

    base = bases.load("sprout")
    task = graft.training.objectives.find("image-classification")(base.model, base.processor)
    rows = tasks.load("digits", split="validation").select(range(5))
    images, _ = pictures.digits("validation")
    arrays = [row["image"] for row in rows]
    for given in (arrays, [Image.fromarray(a) for a in arrays], [a[..., :1] for a in arrays]):
        torch.testing.assert_close(task.pixels(given)["pixel_values"], images[:5], atol=1e-6, rtol=0)
    large = [Image.fromarray(a).resize((64, 64)) for a in arrays]
    assert (task.pixels(large)["pixel_values"] - images[:5]).abs().mean() < 0.25


def test_an_adapter_with_a_new_classifier_learns_all_digits_from_the_command_line(tmp_path, capsys):
    from graft.cli import run

    place = tmp_path / "adapter"
    tune = ["tune", "graft:sprout", "--data", "task:digits", "--method", "lora", "--output", str(place)]
    assert run([*tune, "--steps", "60", "--batch-size", "32", "--learning-rate", "5e-3", "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert done["objective"] == "image-classification" and done["heads"] == ["classifier"]
    assert done["labels"] == list("0123456789")
    assert run(["eval", "graft:sprout", "--adapter", str(place), "--data", "task:digits", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] > 0.8
