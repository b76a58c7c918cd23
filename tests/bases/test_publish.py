"""What `publish` writes."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import graft
from graft.bases.card import KEYS, check, curve, markdown, sparkline
from models import llama, tokenizer
from publish import publish
from published import CARD


def contents(folder):
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_the_checkpoint_is_the_model_rounded_to_bfloat16_and_the_model_stays(tmp_path):
    model = llama(rope_theta=500.0)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    package = publish("two-words", model, tokenizer(), CARD, tmp_path)
    assert package == tmp_path / "two_words"
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    back = type(model).from_pretrained(package / "checkpoint", dtype="auto")
    assert all(torch.equal(v, before[k].bfloat16()) for k, v in back.state_dict().items())
    config = json.loads((package / "checkpoint" / "config.json").read_text())
    assert config["rope_theta"] == config.get("rope_parameters", config)["rope_theta"]
    card = json.loads((package / "card.json").read_text())
    assert card["name"] == "two-words" and card["parameters"] == sum(p.numel() for p in model.parameters())
    assert card["files"].keys() == contents(package / "checkpoint").keys()
    assert card.items() >= CARD.items()


def test_publishing_again_gives_the_same_bits_and_leaves_nothing_else(tmp_path):
    package = publish("tiny", llama(), tokenizer(), CARD, tmp_path)
    first = contents(package)
    (package / "__init__.py").write_text("")
    (package / "checkpoint" / "of-before.txt").write_text("")
    assert contents(publish("tiny", llama(), tokenizer(), CARD, tmp_path)) == first | {"__init__.py": b""}


def wrong(**changes):
    return {k: v for k, v in (CARD | changes).items() if v is not None}


@pytest.mark.parametrize(
    "name, card, said",
    [
        ("Tiny", CARD, "name"),
        ("a_b", CARD, "name"),
        ("tiny", wrong(licence=None), "licence"),
        ("tiny", wrong(summary=""), "summary"),
        ("tiny", wrong(kind="decoder"), "decoder"),
        ("tiny", wrong(data=[{"what": "noise"}]), "data"),
        ("tiny", wrong(training={}), "training"),
        ("tiny", wrong(measured={"loss": "low"}), "measured"),
        ("tiny", wrong(curve=[[0, 1.0]]), "curve"),
        ("tiny", wrong(author="me"), "author"),
    ],
)
def test_an_incomplete_card_is_refused_and_what_was_there_stays(tmp_path, name, card, said):
    package = publish("tiny", llama(), tokenizer(), CARD, tmp_path)
    before = contents(tmp_path)
    with pytest.raises(graft.GraftError, match=said):
        publish(name, llama(seed=1), tokenizer(), card, tmp_path)
    assert contents(tmp_path) == before and package.exists()


def test_weights_that_are_not_finite_are_refused(tmp_path):
    model = llama()
    model.lm_head.weight.data[0, 0] = torch.nan
    with pytest.raises(graft.GraftError, match=r"lm_head\.weight holds NaN"):
        publish("tiny", model, tokenizer(), CARD, tmp_path)
    assert not contents(tmp_path)


def test_a_write_that_fails_leaves_the_older_checkpoint(tmp_path, monkeypatch):
    package = publish("tiny", llama(), tokenizer(), CARD, tmp_path)
    before = contents(tmp_path)

    class Full:
        def save_pretrained(self, folder):
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        publish("tiny", llama(seed=1), Full(), CARD, tmp_path)
    assert contents(tmp_path) == before and [p.name for p in package.glob(".*")] == []


def test_the_card_is_told_in_full():
    card = CARD | {"name": "tiny", "version": 3, "parameters": 12345, "files": {"config.json": "0" * 64}}
    check(card)
    assert card.keys() == KEYS.keys()
    text = markdown(card)
    assert all(said in text for said in ("12,345", "Version 3", "| noise | CC0-1.0 | 1,234 |", "this 3.25, 5-gram 2.5"))
    assert curve(card) == [
        "training loss █▅▁ 4 at step 0, 2 at step 2",
        "held-out loss █▁ 4.25 at step 0, 3.5 at step 2",
    ]


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=300), st.integers(1, 60))
def test_a_sparkline_is_as_high_as_its_numbers(values, width):
    line = sparkline(values, width)
    assert len(line) == min(width, len(values))
    if len(values) <= width:
        order = sorted(range(len(values)), key=values.__getitem__)
        assert sorted(line) == [line[i] for i in order]
