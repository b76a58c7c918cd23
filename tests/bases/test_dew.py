"""dew: its sampler, its loss, adapters on it, and what was published."""

import copy
import json

import pytest
import torch

import graft
from graft.bases.dew import DewConfig, DewForImageGeneration
from graft.training.objectives.flow_matching import flow_loss
from models import move

SIZES = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)


def small(seed=0, **sizes):
    """A model of random weights, which says something: its last matrices are not zero."""
    torch.manual_seed(seed)
    model = DewForImageGeneration(DewConfig(**(SIZES | sizes), num_labels=10)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def seeded(seed):
    return torch.Generator().manual_seed(seed)


class Known(DewForImageGeneration):
    """Instead of a network, a velocity in closed form: a function of x, t and the labels."""

    field = None

    def forward(self, pixel_values, time, labels):
        return self.field(pixel_values, time[:, None, None, None], labels)


def known(field):
    model = Known(DewConfig(**SIZES, num_labels=10))
    model.field = field
    return model


# The sampler


def test_the_sampler_follows_the_flow_to_a_normal_distribution():
    """The flow from N(0, 1) to N(m, s^2) along straight paths ends at m + s noise; Heun's error is of second order."""
    m, s = 0.7, 0.2

    def field(x, t, labels):
        variance = (1 - t) ** 2 + t**2 * s**2
        return m + (t * s**2 - (1 - t)) / variance * (x - t * m)

    model, noise = known(field), torch.randn(3, 1, 8, 8, generator=seeded(0))
    labels = torch.zeros(3, dtype=torch.long)
    errors = [float((model.flow(noise, labels, steps=n) - m - s * noise).abs().max()) for n in (32, 64, 128)]
    assert errors[2] < 1e-3
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.3) and errors[1] / errors[2] == pytest.approx(4, rel=0.3)


@pytest.mark.parametrize("guidance", [0.0, 1.0, 2.5])
def test_guidance_goes_from_the_velocity_without_a_label_along_the_difference(guidance):
    model = known(
        lambda x, t, labels: torch.where(labels == 10, -1.0, labels.float())[:, None, None, None].expand_as(x)
    )
    noise, labels = torch.randn(4, 1, 8, 8, generator=seeded(0)), torch.tensor([0, 3, 5, 9])
    gone = model.flow(noise, labels, steps=3, guidance=guidance) - noise
    expected = -1 + guidance * (labels.float() + 1)
    torch.testing.assert_close(gone, expected[:, None, None, None].expand_as(gone), atol=1e-5, rtol=1e-5)


def test_the_generator_alone_decides_what_is_drawn():
    model, labels = small(), torch.arange(10)
    first = model.sample(labels, steps=3, generator=seeded(1))
    torch.manual_seed(123)
    assert torch.equal(model.sample(labels, steps=3, generator=seeded(1)), first)
    assert not torch.equal(model.sample(labels, steps=3, generator=seeded(2)), first)
    assert first.shape == (10, 1, 8, 8) and first.abs().max() <= 1


def test_an_image_depends_on_its_own_noise_and_label_only():
    model, noise, labels = small(), torch.randn(6, 1, 8, 8, generator=seeded(0)), torch.tensor([0, 1, 2, 3, 9, 1])
    together = model.flow(noise, labels, steps=4, guidance=2.0)
    alone = torch.cat([model.flow(noise[i : i + 1], labels[i : i + 1], steps=4, guidance=2.0) for i in range(6)])
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(model.flow(noise[1:2], labels[2:3], steps=4), together[1:2], atol=1e-2)


# The network


def test_a_new_model_has_no_velocity_and_its_loss_is_the_mean_square_of_image_minus_noise():
    torch.manual_seed(0)
    model = DewForImageGeneration(DewConfig(**SIZES, num_labels=10))
    images, noise = torch.rand(5, 1, 8, 8) * 2 - 1, torch.randn(5, 1, 8, 8)
    losses = flow_loss(model, images, torch.arange(5), torch.rand(5), noise)
    torch.testing.assert_close(losses, (images - noise).square().mean((1, 2, 3)))


@pytest.mark.parametrize("patch, channels", [(1, 1), (2, 1), (4, 3)])
def test_without_blocks_a_pixel_reaches_its_own_patch_only(patch, channels):
    """Patches are squares, and come back to where they were."""
    model = small(patch_size=patch, num_channels=channels, num_hidden_layers=0).double()
    x, time, label = (
        torch.zeros(1, channels, 8, 8, dtype=torch.double),
        torch.zeros(1),
        torch.zeros(1, dtype=torch.long),
    )
    with torch.no_grad():
        changed = x.clone()
        changed[0, 0, 5, 2] = 1.0
        moved = (model(changed, time, label) != model(x, time, label))[0]
    rows, columns = (slice(i // patch * patch, i // patch * patch + patch) for i in (5, 2))
    assert moved[:, rows, columns].all() and moved.sum() == channels * patch**2


def test_it_comes_back_from_a_folder_bit_for_bit(tmp_path):
    model = small()
    model.save_pretrained(tmp_path / "dew")
    again = DewForImageGeneration.from_pretrained(tmp_path / "dew")
    assert again.config.to_diff_dict() == model.config.to_diff_dict()
    labels = torch.arange(4)
    assert torch.equal(
        again.sample(labels, steps=2, generator=seeded(0)), model.sample(labels, steps=2, generator=seeded(0))
    )


# Adapters


@pytest.mark.parametrize(
    "method", ["lora", "dora", "houlsby", "parallel_adapter", "bitfit", "ia3", "ln_tuning", "vera"]
)
def test_an_adapter_changes_no_image_at_first_and_then_every_one(method):
    model, labels = small(), torch.arange(10)
    before = model.sample(labels, steps=2, generator=seeded(0))
    adapter = graft.attach(model, method)
    if graft.METHODS[method].starts_as_base:
        torch.testing.assert_close(model.sample(labels, steps=2, generator=seeded(0)), before, atol=1e-5, rtol=1e-5)
    flow_loss(model, before, labels, torch.rand(10), torch.randn_like(before)).sum().backward()
    assert all(p.grad is not None for d in adapter.deltas.values() for p in d.parameters() if p.requires_grad)
    move(adapter)
    moved = (model.sample(labels, steps=2, generator=seeded(0)) - before).abs().amax((1, 2, 3))
    assert (moved > 1e-3).all()
    adapter.detach()
    assert torch.equal(model.sample(labels, steps=2, generator=seeded(0)), before)


def test_presets_find_the_parts_of_the_network():
    model = small()

    def found(preset, kinds=("linear",)):
        from graft.core.targets import resolve

        return {path for path, _ in resolve(model, preset, kinds)}

    inside = {f"blocks.{i}.attention.{m}" for i in range(2) for m in ("query", "key", "value", "out")}
    assert found("attention") == inside
    assert found("qv") == {p for p in inside if p.endswith(("query", "value"))}
    assert found("mlp") == {f"blocks.{i}.{m}" for i in range(2) for m in ("mlp.fc1", "mlp.fc2", "modulation")}
    assert found("blocks", ("module",)) == {"blocks.0", "blocks.1"}
    assert found("attention", ("module",)) == {"blocks.0.attention", "blocks.1.attention"}
    assert {"patch_embedding", "time_embedding.fc1"} <= found("all-linear") and "projection" not in found("all-linear")


# As it was published


@pytest.fixture(scope="module")
def published():
    pytest.importorskip("sklearn")
    return graft.load_base("graft:dew")


def test_it_draws_the_digits_that_it_is_asked_for(published):
    from graft.tasks.samples import quality

    labels = torch.arange(8).repeat_interleave(12)
    drawn = published.model.sample(labels, steps=8, generator=seeded(0))
    untrained = small().sample(labels, steps=8, generator=seeded(0))
    good, bad = quality(drawn.numpy(), labels), quality(untrained.numpy(), labels)
    assert good["class_accuracy"] > 0.85 and bad["class_accuracy"] < 0.3
    assert good["frechet"] < 0.1 * bad["frechet"]
    guided = published.model.sample(labels, steps=8, guidance=2.0, generator=seeded(0))
    assert quality(guided.numpy(), labels)["class_accuracy"] >= good["class_accuracy"]


def test_it_is_measured_and_adapted_from_the_command_line(published, tmp_path, capsys):
    """It names the digits it has seen by their loss, and learns to draw those which it has not."""
    from graft.cli import run

    new = tmp_path / "new.jsonl"
    images = [row for row in graft.tasks.load("digits") if row["label"] in "89"]
    new.write_text("".join(json.dumps({"image": {"path": str(tmp_path / f"{i}.png")}, "label": r["label"]}) + "\n"
                           for i, r in enumerate(images)))  # fmt: skip
    Image = pytest.importorskip("PIL.Image")
    for i, row in enumerate(images):
        Image.fromarray(row["image"]).save(tmp_path / f"{i}.png")

    def measured(*args):
        assert run(["eval", "graft:dew", "--data", str(new), "--json", *args]) == 0
        return json.loads(capsys.readouterr().out)["loss"]

    before = measured()
    place = tmp_path / "adapter"
    tune = ["tune", "graft:dew", "--data", str(new), "--method", "lora", "--rank", "8", "--output", str(place)]
    assert run([*tune, "--steps", "60", "--batch-size", "32", "--learning-rate", "5e-3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["objective"] == "flow-matching"
    assert measured("--adapter", str(place)) < 0.9 * before
    picture = tmp_path / "grid.png"
    draw = [
        "sample",
        "graft:dew",
        "--adapter",
        str(place),
        "--label",
        "8",
        "--label",
        "9",
        "--count",
        "3",
        "--zoom",
        "4",
    ]
    assert run([*draw, "--steps", "4", "--output", str(picture)]) == 0
    assert Image.open(picture).size == (3 * 9 * 4, 2 * 9 * 4)
    capsys.readouterr()
    assert run([*draw[:-2], "--label", "x", "--output", str(picture)]) == 2
    assert "knows no label 'x'; it has 0, 1, 2" in capsys.readouterr().err


def test_the_card_holds_its_loss(published):
    import dew

    model = copy.deepcopy(published.model).float()
    figures = graft.bases.find("dew").card["measured"]["loss on test images of 0 to 7"]
    assert dew.mean_loss(model, *dew.known("test")) == pytest.approx(figures["dew"], rel=1e-4)
    assert figures["dew"] < 0.4 * figures["untrained"]
