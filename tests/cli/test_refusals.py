"""Bad input: one sentence on stderr, nothing on stdout, exit code 2, and nothing left on disk."""

import json
import os
import shutil
import subprocess
import sys

import pytest

GOOD = ["tune", "{house}/bert", "--data", "{house}/reviews.jsonl", "--output", "{tmp}/out"]


def tune(**changes):
    """The good command with other values for the model, --data or --output."""
    values = {"model": "{house}/bert", "data": "{house}/reviews.jsonl", "output": "{tmp}/out"} | changes
    return ["tune", values["model"], "--data", values["data"], "--output", values["output"]]


CASES = {
    "no such folder": (tune(model="{tmp}/nope"), "there is no folder"),
    "a file as a model": (tune(model="{house}/reviews.jsonl"), "is a file"),
    "no model in the folder": (tune(model="{tmp}/empty"), "no config.json"),
    "a model id while offline": (tune(model="nobody/nothing"), "hub cannot be reached"),
    "broken configuration": (tune(model="{tmp}/torn"), "is damaged"),
    "broken weights": (tune(model="{tmp}/cut"), "is damaged"),
    "pickled weights": (tune(model="{tmp}/pickled"), "no weights in safetensors"),
    "no such data": (tune(data="{house}/review.jsonl"), "did you mean reviews.jsonl"),
    "broken data": (tune(data="{tmp}/bad.jsonl"), "line 2 of bad.jsonl is not JSON"),
    "unknown columns": (tune(data="{tmp}/other.jsonl"), "no objective fits"),
    "missing column": ([*GOOD, "--columns", "text=body"], "no column 'body'"),
    "unknown label": ([*GOOD, "--labels", "yes,no"], "none of yes, no"),
    "unknown objective": ([*GOOD, "--objective", "guess"], "no objective is called 'guess'"),
    "objective of other models": ([*GOOD, "--objective", "seq2seq"], "has no model for seq2seq"),
    "an encoder that should predict the next token": (tune(data="{house}/prompts.jsonl"), "is no decoder"),
    "output exists": (tune(output="{house}/bert"), "exists already"),
    "no output": (GOOD[:4], "output is missing"),
    "nothing to resume": ([*GOOD, "--resume"], "no checkpoint"),
    "unknown method": ([*GOOD, "--method", "lorra"], "did you mean lora"),
    "one method twice": ([*GOOD, "--method", "lora", "--method", "lora"], "lora is named twice"),
    "an option that two methods have": ([*GOOD, "--method", "lora", "--method", "dora", "--rank", "2"], "--rank"),
    "unknown option": ([*GOOD, "--rnak", "3"], "--rank"),
    "hyperparameter of a wrong type": ([*GOOD, "--rank", "many"], "rank must be int, at least 1, not 'many'"),
    "hyperparameter out of range": ([*GOOD, "--rank", "0"], "rank must be int, at least 1, not '0'"),
    "setting of a wrong type": ([*GOOD, "--learning-rate", "fast"], "learning_rate must be float"),
    "setting out of range": ([*GOOD, "--batch-size", "0"], "batch_size"),
    "unknown targets": ([*GOOD, "--targets", "qurey"], "query"),
    "unknown optimizer": ([*GOOD, "--optimizer", "adamz"], "did you mean"),
    "an option of the optimizer that has a setting": (
        [*GOOD, "--optimizer-options", "lr=1"],
        "set learning_rate instead of optimizer_options",
    ),
    "validation that is no share": ([*GOOD, "--validation", "2"], "validation is data, or a share"),
    "a loss that is not finite": (
        [*GOOD, "--optimizer", "sgd", "--learning-rate", "1e30", "--clip", "none"],
        "is nan at step 2",
    ),
    "unknown metric": ([*GOOD, "--validation", "0.2", "--metric", "speed"], "no metric 'speed'"),
    "unknown precision of the base": ([*GOOD, "--dtype", "int3"], "dtype is one of"),
    "no such recipe": ([*GOOD, "--recipe", "{tmp}/nope.yaml"], "there is no recipe"),
    "a recipe that is no YAML": ([*GOOD, "--recipe", "{tmp}/bad.yaml"], "no valid YAML"),
    "a recipe that is a list": ([*GOOD, "--recipe", "{tmp}/list.yaml"], "must hold entries"),
    "unknown key in a recipe": ([*GOOD, "--recipe", "{tmp}/typo.yaml"], "did you mean rank"),
    "wrong value in a recipe": ([*GOOD, "--recipe", "{tmp}/value.yaml"], "rank must be int, at least 1, not 'eight'"),
    "no such adapter": (["eval", "{house}/bert", "--adapter", "{tmp}/nope", "--data", "{house}/reviews.jsonl"], "nope"),
    "no adapter in the folder": (
        ["eval", "{house}/bert", "--adapter", "{tmp}/empty", "--data", "{house}/reviews.jsonl"],
        "adapter_config.json",
    ),
    "broken adapter": (
        ["eval", "{house}/bert", "--adapter", "{tmp}/damaged", "--data", "{house}/reviews.jsonl"],
        "damaged",
    ),
    "adapter of another base": (
        ["eval", "{house}/llama", "--adapter", "{classifier}", "--data", "{house}/reviews.jsonl"],
        "was trained on",
    ),
    "no such device": (
        ["eval", "{house}/bert", "--adapter", "{classifier}", "--data", "{house}/reviews.jsonl", "--device", "tpu9"],
        "device 'tpu9' cannot be used",
    ),
    "a base without outputs": (
        ["eval", "{house}/bert", "--data", "{house}/reviews.jsonl"],
        "has no outputs for a task",
    ),
    "nothing to predict": (["predict", "{house}/bert", "--adapter", "{classifier}"], "--data FILE or --text TEXT"),
    "a classifier that should write": (
        ["generate", "{house}/bert", "--adapter", "{classifier}", "--prompt", "x"],
        "does not generate",
    ),
    "nothing to go on from": (["generate", "{house}/llama", "--prompt", ""], "no token to go on from"),
    "sampling out of range": (["generate", "{house}/llama", "--prompt", "x", "--top-p", "2"], "top_p must be"),
    "merge without an output": (["merge", "{house}/bert", "--adapter", "{classifier}"], "--output"),
    "unknown command": (["tnue"], "tnue"),
    "unknown family": (["methods", "--family", "wieght"], "weight"),
}


@pytest.fixture
def places(house, classifier, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.jsonl").write_text('{"text": "a", "label": "x"}\n{oops\n')
    (tmp_path / "other.jsonl").write_text('{"words": "a"}\n')
    (tmp_path / "bad.yaml").write_text("rank: [\n")
    (tmp_path / "list.yaml").write_text("- rank\n")
    (tmp_path / "typo.yaml").write_text("rnak: 8\n")
    (tmp_path / "value.yaml").write_text("rank: eight\n")
    config = (house / "bert" / "config.json").read_text()
    weights = (house / "bert" / "model.safetensors").read_bytes()
    for name in ("torn", "cut", "pickled"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(config[: 20 if name == "torn" else None])
    (tmp_path / "cut" / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    (tmp_path / "damaged").mkdir()
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        content = bytearray((classifier / file).read_bytes())
        content[-1] ^= 1 if file.endswith("safetensors") else 0
        (tmp_path / "damaged" / file).write_bytes(content)
    return {"house": house, "tmp": tmp_path, "classifier": classifier}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_sentence(graft, places, name, monkeypatch):
    monkeypatch.setattr("graft.models._reachable", lambda: False)
    args, said = CASES[name]
    before = sorted(places["tmp"].iterdir())
    done = graft(*(a.format(**places) for a in args))
    assert done.code == 2, done.err
    assert done.out == ""
    assert done.err.startswith("graft: ") and done.err.count("\n") == 1
    assert said in done.err
    assert sorted(places["tmp"].iterdir()) == before


def test_a_model_id_is_found_in_the_cache_without_a_network(house, tmp_path):
    """The layout of the cache is the hub client's own."""
    place = tmp_path / "models--somebody--bert"
    shutil.copytree(house / "bert", place / "snapshots" / "abc")
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("abc")
    program = "import sys; from graft.cli import run; sys.exit(run(['show', 'somebody/bert', '--json']))"
    away = {**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=away)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["class"] == "BertModel"
