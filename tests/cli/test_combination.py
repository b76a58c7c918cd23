"""graft combine, convert and extract: what they write computes what they say."""

import pytest
import torch

import graft as library


@pytest.fixture(scope="module")
def adapters(house, tmp_path_factory):
    """Two adapters of the llama, LoRA and DoRA, of different ranks."""
    folder = tmp_path_factory.mktemp("adapters")
    base = library.load_base(house / "llama")
    for i, recipe in enumerate((library.LoRA(rank=2), library.DoRA(rank=3))):
        adapter = library.attach(base.model, recipe, "qv", name=f"a{i}")
        torch.manual_seed(i)
        with torch.no_grad():
            for p in adapter.parameters():
                p.add_(0.2 * torch.randn_like(p))
        adapter.save(folder / f"a{i}", base_model=str(house / "llama"))
    return folder


def logits(model):
    return model(torch.arange(6)[None]).logits


def loaded(house, folder):
    return logits(library.load_adapted(house / "llama", folder).model)


def test_combine_writes_the_weighted_sum(graft, house, adapters, tmp_path):
    given = [house / "llama", f"{adapters}/a0=0.5", f"{adapters}/a1=-2"]
    told = graft("combine", *given, "--output", tmp_path / "sum", "--json").json
    assert told["exact"] and told["method"] == "full" and told["error"] == 0
    base = library.load_base(house / "llama")
    for i in range(2):
        library.load(base.model, adapters / f"a{i}", name=f"a{i}")
    library.combine(base.model, {"a0": 0.5, "a1": -2.0})
    torch.testing.assert_close(loaded(house, tmp_path / "sum"), logits(base.model))


def test_combine_passes_options_on(graft, house, adapters, tmp_path):
    given = [house / "llama", f"{adapters}/a0=1", f"{adapters}/a1=1"]
    out = tmp_path / "ties"
    told = graft("combine", *given, "--method", "ties", "--density", "0.5", "--rank", "2", "--output", out, "--json")
    base = library.load_base(house / "llama")
    for i in range(2):
        library.load(base.model, adapters / f"a{i}", name=f"a{i}")
    done = library.combine(base.model, {"a0": 1, "a1": 1}, "ties", density=0.5, rank=2)
    assert told.json["error"] == pytest.approx(done.error, rel=1e-4) and not told.json["exact"]
    torch.testing.assert_close(loaded(house, out), logits(base.model))
    printed = graft("combine", *given, "--method", "ties", "--density", "0.5", "--rank", "2", "--output", f"{out}2").out
    assert f"{done.error:.2%}" in printed and "model.layers.0.self_attn.q_proj" in printed


def test_convert_gives_a_lora_that_peft_reads(graft, house, adapters, tmp_path):
    peft = pytest.importorskip("peft")
    out = tmp_path / "lora"
    told = graft(
        "convert", house / "llama", "--adapter", adapters / "a1", "--format", "peft", "--output", out, "--json"
    ).json
    assert told["exact"] and told["method"] == "lora"
    theirs = peft.PeftModel.from_pretrained(library.load_base(house / "llama").model, out)
    torch.testing.assert_close(logits(theirs), loaded(house, adapters / "a1"), rtol=1e-4, atol=1e-5)


def test_extract_finds_what_was_merged(graft, house, adapters, tmp_path):
    merged = tmp_path / "merged"
    assert graft("merge", house / "llama", "--adapter", adapters / "a0", "--output", merged).code == 0
    told = graft("extract", house / "llama", merged, "--rank", 2, "--output", tmp_path / "again", "--json").json
    assert told["exact"] and told["method"] == "lora" and len(told["errors"]) == 4
    torch.testing.assert_close(
        loaded(house, tmp_path / "again"), loaded(house, adapters / "a0"), rtol=1e-4, atol=1e-5
    )  # fmt: skip


def test_extract_brings_the_classifier_along(graft, house, classifier, tmp_path):
    merged, out = tmp_path / "merged", tmp_path / "again"
    assert graft("merge", house / "bert", "--adapter", classifier, "--output", merged).code == 0
    asked = ["--rank", 4, "--objective", "classification", "--output", out, "--json"]
    told = graft("extract", house / "bert", merged, *asked).json
    assert told["exact"] and "classifier" in told["errors"]
    texts = [part for t in ("the film was good", "awful book") for part in ("--text", t)]
    first, second = (
        graft("predict", house / "bert", "--adapter", a, *texts, "--json").json for a in (classifier, out)
    )  # fmt: skip
    assert [s["label"] for s in first] == [s["label"] for s in second]
    for a, b in zip(first, second):
        assert a["probability"] == pytest.approx(b["probability"], rel=1e-3)


def test_refusals_are_one_sentence(graft, house, adapters, tmp_path):
    out = ["--output", tmp_path / "out"]
    for given, says in (
        ([f"{adapters}/a0"], "a0 must be an adapter with its weight, such as"),
        ([f"{adapters}/a0=x"], "a0=x must be an adapter with its weight"),
        ([f"{adapters}/a0=1", "--density", "0.5"], "sum has no option 'density'"),
        ([f"{adapters}/a0=1", "--rank", "0"], "rank must be int, at least 1, not 0"),
    ):
        done = graft("combine", house / "llama", *given, *out)
        assert done.code == 2 and says in done.err and done.err.count("\n") == 1
    done = graft("extract", house / "llama", house / "bert", *out)
    assert done.code == 2 and "the tuned model lacks" in done.err
    assert not (tmp_path / "out").exists()
