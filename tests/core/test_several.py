"""Several adapters as one folder: the order of their chain and which of them run are part of it."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import graft
from graft import GraftError
from graft.core import files
from graft.core.formats import file_names
from models import bert, damage, llama, move, picture, tokens

CHAIN, CONFIG, TENSORS, CARD = "adapters.json", "adapter_config.json", "adapter_model.safetensors", "README.md"
IDS = tokens()
METHODS = {
    "lora": graft.LoRA(rank=2),
    "dora": graft.DoRA(rank=2),
    "oft": graft.OFT(block=8),
    "ia3": graft.IA3(),
    "loha": graft.LoHa(rank=2),
    "hra": graft.HRA(rank=2),
    "houlsby": graft.Houlsby(size=3),
    "prompt_tuning": graft.PromptTuning(length=2),
    "prefix_tuning": graft.PrefixTuning(length=2),
}


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def chained(names, model=None):
    """A model with adapters of the methods `names`, each called like its method."""
    model = llama() if model is None else model
    for i, name in enumerate(names):
        move(graft.attach(model, METHODS[name], name=name, seed=i), 0.1, seed=i)
    return model


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """LoRA, DoRA and a prompt; DoRA runs inside LoRA, the prompt is switched off."""
    folder = tmp_path_factory.mktemp("several") / "three"
    model = chained(["lora", "dora", "prompt_tuning"])
    graft.activate(model, "dora", "lora")
    graft.save(model, folder)
    return folder


@pytest.fixture
def copied(three, tmp_path):
    shutil.copytree(three, tmp_path / "copy")
    return tmp_path / "copy"


def edit(folder, change, seal=True):
    chain = json.loads((folder / CHAIN).read_text())
    change(chain)
    if seal:
        chain["checksum"] = files.checksum(chain)
    (folder / CHAIN).write_text(json.dumps(chain))


def refuses(folder, words, model=None, **options):
    model = llama() if model is None else model
    before = picture(model), [*graft.adapters(model)], logits(model)
    with pytest.raises(GraftError, match=words) as caught:
        graft.load(model, folder, **options)
    assert (picture(model), [*graft.adapters(model)]) == before[:2] and torch.equal(logits(model), before[2])
    assert "\n" not in str(caught.value)
    return str(caught.value)


# There and back


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    names=st.lists(st.sampled_from(sorted(METHODS)), min_size=2, max_size=3, unique=True),
    data=st.data(),
)
def test_any_chain_comes_back_in_its_order_bit_for_bit(tmp_path, names, data):
    shutil.rmtree(tmp_path, ignore_errors=True)
    model = chained(names)
    running = data.draw(st.lists(st.sampled_from(names), unique=True))
    graft.activate(model, *running)
    y = logits(model)
    graft.save(model, tmp_path / "a")
    other = llama()
    before, base = picture(other), logits(other)
    made = graft.load(other, tmp_path / "a")
    assert list(made) == list(graft.adapters(other)) == list(graft.adapters(model))
    assert [n for n, a in made.items() if a.active] == running
    assert torch.equal(logits(other), y)
    assert not any(p.requires_grad for a in made.values() for p in a.parameters())
    graft.save(other, tmp_path / "b")
    for file in (p for p in (tmp_path / "a").rglob("*") if p.is_file() and p.name != CARD):
        assert file.read_bytes() == (tmp_path / "b" / file.relative_to(tmp_path / "a")).read_bytes()
    for name in data.draw(st.permutations(names)):
        made[name].detach()
    assert picture(other) == before and torch.equal(logits(other), base)


def test_the_order_is_part_of_the_meaning(tmp_path):
    outputs = []
    for order in (["oft", "dora"], ["dora", "oft"]):
        model = chained(["oft", "dora"])
        graft.activate(model, *order)
        outputs.append(logits(model))
        graft.save(model, tmp_path / order[0])
        other = llama()
        assert list(graft.load(other, tmp_path / order[0])) == order
        assert torch.equal(logits(other), outputs[-1])
    assert not torch.allclose(*outputs, atol=1e-4)


def test_what_activate_puts_in_another_order_stays_in_it():
    model = chained(["oft", "dora", "lora"])
    a, b, c = graft.adapters(model).values()
    before = logits(model)
    graft.activate(model, "lora", "oft")  # they change places around DoRA, which is off
    assert list(graft.adapters(model)) == ["lora", "dora", "oft"]
    y = logits(model)
    with a.disabled():
        assert not torch.equal(logits(model), y)
    assert torch.equal(logits(model), y)
    b.enable()
    host = model.model.layers[0].self_attn.q_proj
    assert host.linked == ("lora", "dora", "oft")
    c.detach()
    assert host.linked == ("dora", "oft")
    with pytest.raises(GraftError, match="'oft' is named twice"):
        graft.activate(model, "oft", "dora", "oft")
    assert host.linked == ("dora", "oft")
    graft.activate(model, "oft", "dora")
    assert list(graft.adapters(model)) == ["oft", "dora"] and not torch.equal(logits(model), before)


def test_beside_adapters_that_are_there(three):
    model = chained(["oft"])
    graft.load(model, three)
    assert list(graft.adapters(model)) == ["oft", "dora", "lora", "prompt_tuning"]
    host = model.model.layers[0].self_attn.q_proj
    assert host.linked == ("oft", "dora", "lora")
    message = refuses(three, "an adapter called 'dora' already.*name=.'dora'", model)
    assert "detach" in message
    again = graft.load(model, three, name={"dora": "d2", "lora": "l2", "prompt_tuning": "p2"}, trainable=True)
    assert list(again) == ["d2", "l2", "p2"] and host.linked == ("oft", "dora", "lora", "d2", "l2")
    assert all(p.requires_grad for a in again.values() for p in a.parameters())
    refuses(three, "called 'x'; it holds dora, lora", model, name={"x": "y"})
    refuses(three, "several adapters", model, name="y")
    refuses(three, "'lora' already", llama(), name={"dora": "lora"})
    refuses(three, "letters", llama(), name={"dora": "../x"})
    refuses(three / "dora", "one adapter", llama(), name={"dora": "x"})


def test_each_folder_is_an_adapter_of_its_own(three):
    model = chained(["lora", "dora", "prompt_tuning"])
    for name in ("lora", "dora", "prompt_tuning"):
        graft.activate(model, name)
        other = llama()
        graft.load(other, three / name)
        assert torch.equal(logits(other), logits(model))


def test_some_of_the_adapters(tmp_path):
    model = chained(["oft", "dora", "lora"])
    graft.save(model, tmp_path / "a", ["lora", "oft"])
    assert [e["name"] for e in json.loads((tmp_path / "a" / CHAIN).read_text())["adapters"]] == ["oft", "lora"]
    graft.activate(model, "oft", "lora")
    other = llama()
    graft.load(other, tmp_path / "a")
    assert torch.equal(logits(other), logits(model))
    for names, words in ([], "names is empty"), (["lora", "x"], "'x'; the model has oft, lora, dora|'x'"):
        with pytest.raises(GraftError, match=words):
            graft.save(model, tmp_path / "b", names)
    with pytest.raises(GraftError, match="carries no adapter"):
        graft.save(llama(), tmp_path / "b")
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("outer", ["both", "second"])
def test_heads_that_the_base_draws_anew(tmp_path, outer):
    """A new classifier is random at every load: no adapter of the folder takes it for a part of the base."""

    def base(seed):
        model = bert()
        torch.manual_seed(seed)
        torch.nn.init.normal_(model.classifier.weight)
        return model

    model = base(1)
    heads = {"heads": "classifier"}
    move(graft.attach(model, "lora", "query", name="a", rank=2, **(heads if outer == "both" else {})))
    move(graft.attach(model, "ia3", ["key", "value"], name="b", **heads), seed=2)
    graft.save(model, tmp_path / "a")
    other = base(2)
    graft.load(other, tmp_path / "a")
    assert torch.equal(logits(other), logits(model))
    graft.load(base(3), tmp_path / "a" / "a")
    with pytest.raises(GraftError, match="other weights"):
        graft.load(bert(seed=5), tmp_path / "a")


def test_the_base_is_fingerprinted_once(three, tmp_path, monkeypatch):
    calls = []
    real = files.fingerprint
    monkeypatch.setattr(files, "fingerprint", lambda *a: calls.append(a) or real(*a))
    model = llama()
    graft.load(model, three)
    assert len(calls) == 1
    graft.save(model, tmp_path / "a")
    assert len(calls) == 2


@pytest.mark.parametrize("order", [["lora", "ia3"], ["ia3", "lora"]])
def test_peft_loads_each_folder_of_its_format(tmp_path, order):
    peft = pytest.importorskip("peft")
    model = chained(order)
    graft.save(model, tmp_path / "a", format="peft")
    other = llama()
    graft.load(other, tmp_path / "a")
    torch.testing.assert_close(logits(other), logits(model), atol=1e-6, rtol=1e-5)
    assert list(graft.adapters(other)) == order
    for name in order:
        graft.activate(model, name)
        theirs = peft.PeftModel.from_pretrained(llama(), tmp_path / "a" / name)
        torch.testing.assert_close(logits(theirs), logits(model), atol=1e-6, rtol=1e-5)


# The folder


def test_the_card_tells_the_order_and_how_to_load(three):
    yaml = pytest.importorskip("yaml")
    _, front, body = (three / CARD).read_text().split("---\n", 2)
    assert yaml.safe_load(front)["tags"] == ["graft", "dora", "lora", "prompt_tuning", "adapter"]
    rows = [line.split("|")[1:4] for line in body.splitlines() if line.startswith("| [")]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["[dora](dora/README.md)", "DoRA", "yes"],
        ["[lora](lora/README.md)", "LoRA", "yes"],
        ["[prompt_tuning](prompt_tuning/README.md)", "PromptTuning", "no"],
    ]
    assert "https://arxiv.org/abs/2106.09685" in body and "graft.load(model, 'three')" in body
    assert sorted(os.listdir(three)) == sorted(["dora", "lora", "prompt_tuning", CHAIN, CARD])
    assert all(sorted(os.listdir(three / n)) == [CARD, CONFIG, TENSORS] for n in ("dora", "lora", "prompt_tuning"))


def test_one_and_several_replace_each_other_when_asked(tmp_path):
    model = chained(["lora", "ia3"])
    graft.save(model, tmp_path / "a")
    with pytest.raises(GraftError, match="overwrite=True"):
        graft.save(model, tmp_path / "a")
    graft.save(model, tmp_path / "a", ["ia3"], overwrite=True)
    assert sorted(os.listdir(tmp_path / "a")) == sorted([CHAIN, CARD, "ia3"])
    graft.adapters(model)["lora"].save(tmp_path / "a", overwrite=True)
    assert sorted(os.listdir(tmp_path / "a")) == sorted([CARD, CONFIG, TENSORS])
    graft.save(model, tmp_path / "a", overwrite=True)
    assert os.listdir(tmp_path) == ["a"]
    graft.load(llama(), tmp_path / "a")


@pytest.mark.parametrize(
    "strange", ["notes.txt", "lora/notes.txt", "data/x.csv", "lora/checkpoint/x", "inner/" + CHAIN]
)
def test_what_else_a_folder_holds_is_never_removed(tmp_path, strange):
    model = chained(["lora", "ia3"])
    graft.save(model, tmp_path / "a")
    (tmp_path / "a" / strange).parent.mkdir(exist_ok=True)
    (tmp_path / "a" / strange).write_text("precious")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for write in (graft.adapters(model)["lora"].save, lambda *a, **k: graft.save(model, *a, **k)):
        with pytest.raises(GraftError, match="no part of an adapter"):
            write(tmp_path / "a", overwrite=True)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("call", range(1, 14))
def test_an_interrupted_save_leaves_the_old_folder(tmp_path, monkeypatch, call):
    """Whichever call fails: of 8 files and 3 folders that are flushed, and of 2 renames."""
    model = chained(["lora", "ia3"])
    graft.save(model, tmp_path / "a")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    move(graft.adapters(model)["ia3"])
    left = [call]

    def failing(real):
        def run(*args):
            left[0] -= 1
            if left[0] == 0:
                raise OSError(28, "No space left on device")
            return real(*args)

        return run

    monkeypatch.setattr(os, "fsync", failing(os.fsync))
    monkeypatch.setattr(os, "rename", failing(os.rename))
    with pytest.raises(GraftError, match="No space left"):
        graft.save(model, tmp_path / "a", overwrite=True)
    monkeypatch.undo()
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_nothing_is_saved_if_one_cannot_be(tmp_path):
    model = chained(["lora", "houlsby"])
    with pytest.raises(GraftError, match="houlsby"):
        graft.save(model, tmp_path / "a", format="peft")
    with torch.no_grad():
        graft.adapters(model)["houlsby"].parameters()[0].fill_(float("nan"))
    with pytest.raises(GraftError, match="adapter 'houlsby' holds NaN"):
        graft.save(model, tmp_path / "a")
    assert not os.listdir(tmp_path)


# Damaged folders: all or nothing


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_bytes_load_as_before_or_are_refused_whole(three, tmp_path, data):
    folder = tmp_path / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(three, folder)
    file = data.draw(st.sampled_from(sorted(p for p in folder.rglob("*") if p.is_file() and p.name != CARD)))
    damage(file, data)
    model = llama()
    before = picture(model)
    try:
        made = graft.load(model, folder)
    except GraftError as error:
        assert "\n" not in str(error)
        assert file.parent == folder or f"adapter {file.parent.name!r} of" in str(error)
    else:
        expect = llama()
        graft.load(expect, three)
        assert list(made) == ["dora", "lora", "prompt_tuning"] and torch.equal(logits(model), logits(expect))
        for adapter in made.values():
            adapter.detach()
    assert picture(model) == before


def swap(folder):
    for file in (CONFIG, TENSORS):
        shutil.copy(folder / "dora" / file, folder / "lora" / file)


def elsewhere(folder):
    (folder / "lora").rename(folder.parent / "x")
    (folder / "lora").symlink_to(folder.parent / "x")


DAMAGE = {
    "no folder": (lambda f: shutil.rmtree(f / "prompt_tuning"), "'prompt_tuning' of .* holds no prompt_tuning/adapter"),
    "another's files": (swap, "'lora' of .*damaged or changed"),
    "edited": (lambda f: edit(f, lambda c: c["adapters"].reverse(), seal=False), "adapters.json was damaged or edited"),
    "a later format": (lambda f: edit(f, lambda c: c.update(format_version=9)), "adapters.json has format 9"),
    "no format": (lambda f: edit(f, lambda c: c.pop("format")), "not graft's"),
    "no list": (lambda f: edit(f, lambda c: c.update(adapters={})), "adapters must be a list"),
    "nothing": (lambda f: edit(f, lambda c: c.update(adapters=[])), "adapters must be a list"),
    "no name": (lambda f: edit(f, lambda c: c["adapters"][0].pop("name")), "adapters must be a list"),
    "a path for a name": (lambda f: edit(f, lambda c: c["adapters"][0].update(name="../x")), "adapters must be a list"),
    "a number for a flag": (lambda f: edit(f, lambda c: c["adapters"][0].update(active=1)), "adapters must be a list"),
    "twice": (lambda f: edit(f, lambda c: c["adapters"].append(c["adapters"][0])), "one of them twice"),
    "no object": (lambda f: (f / CHAIN).write_text("[]"), "must hold an object"),
    "a link out of it": (elsewhere, "leads to"),
}


@pytest.mark.parametrize("damage, words", DAMAGE.values(), ids=DAMAGE)
def test_what_is_not_sound_is_refused_whole(copied, damage, words):
    damage(copied)
    refuses(copied, words)


def test_an_edited_order_can_be_meant(copied):
    edit(copied, lambda c: (c["adapters"].reverse(), c.pop("checksum")), seal=False)
    assert list(graft.load(llama(), copied)) == ["prompt_tuning", "lora", "dora"]


def test_an_adapter_that_cannot_be_put_on_takes_the_others_off(copied, monkeypatch):
    real = graft.Adapter.attach

    def attach(self):
        if self.name == "prompt_tuning":
            raise GraftError("no place")
        real(self)

    monkeypatch.setattr(graft.Adapter, "attach", attach)
    refuses(copied, "no place", chained(["oft"]))


def test_another_base_is_refused_unless_asked_for(three):
    refuses(three, "'dora' of .*allow_other_base=True", llama(seed=1))
    graft.load(llama(seed=1), three, allow_other_base=True)


def test_the_hub_is_asked_for_the_files_of_the_parts(three, monkeypatch):
    import sys
    import types

    asked = []
    module = types.ModuleType("huggingface_hub")
    module.snapshot_download = lambda repo, **options: asked.append(options["allow_patterns"]) or str(three)
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    assert list(graft.load(llama(), "org/three")) == ["dora", "lora", "prompt_tuning"]
    files = file_names()
    assert {CONFIG, TENSORS} <= {*files}
    wanted = [f"{name}/{file}" for name in ("dora", "lora", "prompt_tuning") for file in files]
    assert asked == [[CHAIN, *files], [CHAIN, *wanted]]


def test_links_within_the_hub_s_cache_are_its_layout(three, tmp_path):
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "123", tmp_path / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    for i, file in enumerate(p for p in three.rglob("*") if p.is_file()):
        shutil.copy(file, blobs / str(i))
        link = snapshot / file.relative_to(three)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(Path(os.path.relpath(blobs, link.parent)) / str(i))
    assert list(graft.load(llama(), snapshot)) == ["dora", "lora", "prompt_tuning"]
