"""The registry of formats: one more class is one more format; what a place holds is recognised and shown."""

import json

import pytest
import torch
from torch import nn

import graft
from graft import GraftError
from graft.core.folder import json_bytes, tensor_bytes
from graft.core.formats import FORMATS, Format, Saved
from graft.core.recipe import Recipe
from graft.inspection import adapter_facts
from models import bert, llama, move, tokens


@pytest.fixture
def toy():
    class Toy(Format, name="toy"):
        """One tensor file beside the configuration, and a second one that need not be there."""

        files = ("adapter_config.json", "toy.safetensors")
        optional = ("more.safetensors",)
        sign = '"toy"'

        @classmethod
        def recognises(cls, config):
            return config is not None and "toy" in config

        def write(self, adapter, base):
            parts = list(adapter.state_dict().items())
            return {
                "adapter_config.json": json_bytes({"toy": True, "paths": list(adapter.deltas)}),
                "toy.safetensors": tensor_bytes(dict(parts[:1])),
                **({"more.safetensors": tensor_bytes(dict(parts[1:]))} if parts[1:] else {}),
            }

        def read(self, model, parts):
            paths = parts["adapter_config.json"]["paths"]
            state = parts["toy.safetensors"] | parts.get("more.safetensors", {})
            return Saved(Recipe.of("lora", rank=2), paths, [], state)

        @classmethod
        def facts(cls, config, keys):
            return {"method": "lora", "sites": len(config["paths"])}

    yield
    del FORMATS["toy"]


def line():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3))


def test_a_class_is_all_that_a_format_needs(tmp_path, toy):
    ours, again = line(), line()
    adapter = move(graft.attach(ours, graft.LoRA(rank=2), "0"))
    adapter.save(tmp_path / "a", format="toy")
    assert (tmp_path / "a" / "README.md").exists()
    graft.load(again, tmp_path / "a")
    x = torch.randn(2, 4)
    assert torch.equal(again(x), ours(x))
    (facts,) = adapter_facts(tmp_path / "a")
    assert (facts["format"], facts["method"], facts["sites"]) == ("toy", "lora", 1)

    adapter.save(tmp_path / "a", format="graft", overwrite=True)  # a folder of another format is an adapter's too
    assert not (tmp_path / "a" / "toy.safetensors").exists()
    adapter.save(tmp_path / "a", format="toy", overwrite=True)
    (tmp_path / "a" / "toy.safetensors").unlink()
    with pytest.raises(GraftError, match=r"holds no toy\.safetensors"):
        graft.load(line(), tmp_path / "a")


def test_a_second_adapter_of_a_chain_in_its_format(tmp_path, toy):
    ours, again = line(), line()
    for name in ("one", "two"):
        move(graft.attach(ours, graft.LoRA(rank=2), "0", name=name), seed=len(name))
    graft.save(ours, tmp_path / "a", format="toy")
    assert list(graft.load(again, tmp_path / "a")) == ["one", "two"]
    x = torch.randn(2, 4)
    torch.testing.assert_close(again(x), ours(x))
    (tmp_path / "a" / "two" / "more.safetensors").write_bytes(tensor_bytes({"0:B": torch.zeros(3, 2)}))
    with pytest.raises(GraftError, match="checksum"):
        graft.load(line(), tmp_path / "a")


@pytest.mark.parametrize("format", ["lycoris", "kohya"])
def test_a_single_file_holds_one_adapter(tmp_path, format):
    model = line()
    graft.attach(model, graft.LoRA(rank=2), "0")
    with pytest.raises(GraftError, match=r"holds one adapter: save each with Adapter\.save"):
        graft.save(model, tmp_path / "a", format=format)
    assert not list(tmp_path.iterdir())


SHOWN = {
    "graft": ("lora", "a"),
    "peft": ("lora", "a"),
    "vllm": ("lora", "a"),
    "adapters": ("lora", "a"),
    "lycoris": ("lora", "a.safetensors"),
    "kohya": ("lora", "a.safetensors"),
}


@pytest.mark.parametrize("format", SHOWN)
def test_show_names_the_format(tmp_path, format):
    method, name = SHOWN[format]
    model = llama()
    adapter = move(graft.attach(model, method, "qv"))
    adapter.save(tmp_path / name, format=format)
    (facts,) = adapter_facts(tmp_path / name)
    assert facts["format"] == ("peft" if format == "vllm" else format)  # a folder for vLLM is PEFT's
    assert facts["method"] == method
    assert facts["sites"] in (4, None)  # PEFT's configuration has no list of them
    assert facts["parameters"] >= sum(p.numel() for p in adapter.parameters())
    again = llama()
    graft.load(again, tmp_path / name)
    torch.testing.assert_close(again(tokens()).logits, model(tokens()).logits, rtol=1e-4, atol=1e-5)


def test_the_command_shows_a_file(tmp_path, capsys):
    from graft.cli import run

    graft.attach(bert(), "loha", "qv").save(tmp_path / "a.safetensors", format="lycoris")
    assert run(["show", str(tmp_path / "a.safetensors"), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["kind"], shown["format"], shown["method"], shown["sites"]) == ("adapter", "lycoris", "loha", 4)


def test_what_is_of_no_format(tmp_path):
    with pytest.raises(GraftError, match=r"'adapters' or .* or 'vllm', not 'onnx'"):
        graft.attach(line(), "lora", "0").save(tmp_path / "a", format="onnx")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "adapter_config.json").write_text("{}")
    with pytest.raises(GraftError, match=r'no format that is known here: .*graft has "format": "graft".*"peft_type"'):
        graft.load(line(), tmp_path / "a")
