"""--quantise: a run on a quantised base, and what follows from its file."""

import json

import yaml


def test_a_quantised_base_from_training_to_a_plain_checkpoint(graft, house, tmp_path):
    folder, said = tmp_path / "adapter", ["--text", "the film was great", "--text", "the story was dull"]
    done = graft(
        "tune", house / "bert", "--data", house / "reviews.jsonl", "--quantise", "int8", "--rank", "4",
        "--learning-rate", "1e-2", "--epochs", "30", "--output", folder, "--json",
    )  # fmt: skip
    assert done.code == 0 and done.json["loss"] < 0.3, done.err
    assert done.json["heads"] == ["bert.pooler", "classifier"]
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_quantised"] == "int8"
    assert yaml.safe_load((folder / "recipe.yaml").read_text())["quantise"] == "int8"

    import graft as library

    base = library.tune(
        house / "bert", str(house / "reviews.jsonl"), method=library.LoRA(rank=4), quantise="int8", learning_rate=1e-2,
        epochs=30,
    ).base  # fmt: skip
    expect = library.predict(base.model, [{"text": said[1]}, {"text": said[3]}], **base.arguments())
    predict = ("predict", house / "bert", "--adapter", folder, *said, "--json")
    found = graft(*predict).json  # the file says how the base is loaded
    assert found == json.loads(json.dumps(expect))
    assert graft(*predict, "--quantise", "int8").json == found

    refused = graft(*predict, "--quantise", "none")
    assert refused.code == 2 and "quantised by int8" in refused.err and refused.err.count("\n") == 1
    other = graft(*predict, "--quantise", "none", "--allow-other-base")
    assert other.code == 0 and other.json != found
    assert graft("merge", house / "bert", "--adapter", folder, "--output", tmp_path / "merged").code == 0
    merged = graft("predict", tmp_path / "merged", *said, "--objective", "classification", "--json").json
    for ours, theirs in zip(merged, found):  # inputs are not rounded there
        assert ours["label"] == theirs["label"] and abs(ours["probability"] - theirs["probability"]) < 0.05
    wrong = graft("predict", house / "bert", *said, "--objective", "classification", "--quantise", "int9")
    assert wrong.code == 2 and "no scheme of quantisation is called 'int9'" in wrong.err
