"""graft bases, and graft:NAME as the model of the other commands."""

import json
import re

import pytest
import torch

import graft as library
from graft import bases
from models import llama, tokenizer
from published import announce


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    model = llama(vocab_size=len(tokenizer()), pad_token_id=0, bos_token_id=None, eos_token_id=2, initializer_range=0.3)
    announce(monkeypatch, tmp_path / "site", "tiny-one", model)
    return "graft:tiny-one"


def test_bases_lists_what_there_is(graft, tiny):
    listed = graft("bases", "--json").json
    assert [b["name"] for b in listed] == bases.names()
    out = graft("bases").out
    for base in listed:
        line = next(line for line in out.splitlines() if base["id"] in line)
        told = (base["kind"], f"{base['parameters']:,}", base["summary"], base["licence"])
        assert all(said in line for said in told) and line.split()[-1] == ("no" if base["missing"] else "yes")


def test_what_is_not_installed_is_listed_with_its_install_line(graft, tiny, tmp_path):
    file = tmp_path / "site" / "tiny_one" / "card.json"
    package = {"distribution": "tiny-weights", "version": "2.0", "folder": "model", "install": "x[tiny]"}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"package": package}))
    out = graft("bases").out
    assert next(line for line in out.splitlines() if tiny in line).split()[-1] == "no"
    assert "`pip install 'x[tiny]'`" in out
    assert "pip install 'x[tiny]'" in graft("bases", "show", "tiny-one", "--json").json["missing"]


def test_show_tells_the_card(graft, tiny):
    card = graft("bases", "show", tiny, "--json").json
    assert card == graft("bases", "show", "tiny-one", "--json").json == bases.describe(bases.find("tiny-one"))
    out = graft("bases", "show", "tiny-one").out
    assert "A base for tests." in out and "training loss █▅▁ 4 at step 0, 2 at step 2" in out
    assert all(said in out for said in ("CC0-1.0", "1,234", "bits per byte", "5-gram 2.5", *card["files"].values()))


@pytest.mark.parametrize(
    "args, said",
    [
        (["show", "tiny-won"], "graft: no base is called 'tiny-won': did you mean tiny-one?"),
        (["show", "graft:"], "graft: no base is called '': known are"),
        (["show"], "graft: graft bases lists them, graft bases show NAME shows one"),
        (["list", "tiny-one"], "graft: graft bases lists them, graft bases show NAME shows one"),
    ],
)
def test_what_cannot_be_shown_is_one_line(graft, tiny, args, said):
    done = graft("bases", *args)
    assert done.code == 2 and done.err.startswith(said) and done.err.count("\n") == 1 and not done.out


@pytest.mark.parametrize("command", ["show", "tune", "eval", "predict", "generate", "merge"])
def test_every_command_names_the_near_bases(graft, house, classifier, command, tmp_path):
    further = {
        "tune": ["--data", house / "prompts.jsonl", "--output", tmp_path / "a"],
        "eval": ["--data", house / "prompts.jsonl"],
        "predict": ["--text", "good"],
        "generate": ["--prompt", "good"],
        "merge": ["--adapter", classifier, "--output", tmp_path / "m"],
    }
    done = graft(command, "graft:minlm", *further.get(command, []))
    assert done.code == 2 and done.err.startswith("graft: no base is called 'minlm': did you mean minilm?")


def test_a_base_goes_through_all_commands_under_either_name(graft, tiny, house, tmp_path):
    data, exact = house / "prompts.jsonl", ["--dtype", "float32"]
    for name in (tiny, "tiny-one"):
        folder = tmp_path / name.replace(":", "-")
        done = graft("tune", name, "--data", data, "--output", folder, "--steps", 3, "--learning-rate", "1e-2", *exact)
        assert done.code == 0, done.err
        assert json.loads((folder / "adapter_config.json").read_text())["base_model"] == tiny
        assert graft("show", folder, "--json").json["base"] == tiny
    first, second = tmp_path / "graft-tiny-one", tmp_path / "tiny-one"
    assert (first / "adapter_model.safetensors").read_bytes() == (second / "adapter_model.safetensors").read_bytes()
    for command, *args in (["eval", "--data", data], ["generate", "--prompt", "the film", "--max-new-tokens", 8]):
        told = [graft(command, name, "--adapter", first, *args, "--json") for name in (tiny, "tiny-one")]
        assert told[0].code == 0 and told[0].json == told[1].json
    assert graft("show", tiny, "--json").json["parameters"] == bases.find(tiny).card["parameters"]
    stored = json.loads((first / "adapter_config.json").read_text())["base_model"]
    adapted = library.load_adapted(stored, first, dtype="float32")
    assert graft("merge", tiny, "--adapter", first, "--output", tmp_path / "plain", *exact).code == 0
    plain = library.load_base(tmp_path / "plain").model
    ids = torch.tensor([[3, 4, 5]])
    torch.testing.assert_close(plain(ids).logits, adapted.model(ids).logits)


def test_fit_and_save_know_a_base_by_the_name_in_its_configuration(tiny, house, tmp_path, monkeypatch):
    base = library.bases.load("tiny-one")
    adapter = library.attach(base.model, "lora")
    library.fit(base.model, str(house / "prompts.jsonl"), steps=1)  # finds the tokenizer by itself
    adapter.save(tmp_path / "a")
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["base_model"] == tiny
    text, again = (tmp_path / "a" / "README.md").read_text(), {}
    assert "graft:tiny-one" in text and "huggingface.co/graft" not in text
    monkeypatch.chdir(tmp_path)
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], again)
    ids = torch.tensor([[3, 4, 5]])
    torch.testing.assert_close(again["base"].model(ids).logits, base.model.eval()(ids).logits)
