"""graft tune --dry-run."""

import graft as library


def test_dry_run_tells_what_training_takes_and_writes_nothing(graft, house):
    before = sorted(house.iterdir())
    options = ["--data", house / "reviews.jsonl", "--rank", "4", "--steps", "5", "--dry-run"]
    said = graft("tune", house / "bert", *options, "--json").json
    assert sorted(house.iterdir()) == before
    base = library.load_base(house / "bert", objective="classification", labels=["disliked", "liked"])
    adapter = library.attach(base.model, "lora", rank=4, heads=base.heads)
    assert said["parameters"] == sum(p.numel() for p in adapter.parameters())
    assert sum(said["parts"].values()) == said["peak"] and said["file"] == 4 * said["parameters"]
    assert said["steps"] == 5 and said["measured"] and said["seconds"] == 5 * said["step_seconds"]
    shown = graft("tune", house / "bert", *options).out
    assert "saved for the backward pass" in shown and f"{said['parameters']:,}" in shown
    wrong = graft("tune", house / "bert", *options, "--precision", "fp64")
    assert wrong.code != 0 and "precision is one of auto, fp32, bf16, not 'fp64'" in wrong.err
