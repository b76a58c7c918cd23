"""What cannot keep within the limits is told before it is started."""

from dataclasses import replace

import pytest
import torch

import graft
from graft.core.errors import GraftError
from graft.models import load_base
from graft.runs.configuration import Configuration
from graft.runs.limits import misfit, size
from graft.runs.single import load, perform, recipes
from graft.tuning import trained


@pytest.fixture
def run(bases):
    def made(method, **options):
        return Configuration(
            base=str(bases / "llama"), task="rewrites", method=method, options=options, train_rows=16, rows=2,
            training={"steps": 2, "batch_size": 2},
        )  # fmt: skip

    return made


def test_a_run_that_would_take_too_much_has_a_reason(run):
    assert misfit(run("lora"), memory=2**30) is None
    assert "not started: it would take" in str(misfit(run("lora"), memory=2**10))
    assert "0.0 MiB are allowed" in str(misfit(run("full-fine-tuning"), memory=2**10))
    assert misfit(run("zero-shot"), memory=1) is None
    assert str(misfit(run("bitfit"), memory=2**30)).startswith("not started: bitfit cannot work at")


@pytest.mark.parametrize("method", ["lora", "vera", "ln_tuning", "lora+ia3"])
def test_trained_parameters_are_those_of_the_run_and_counting_leaves_no_trace(run, method):
    c = run(method)
    base = load(c)
    before = {name: (p.requires_grad, p.clone()) for name, p in base.model.named_parameters()}
    assert trained(base, recipes(c)) == perform(c).parameters
    after = dict(base.model.named_parameters())
    assert [*after] == [*before]
    assert all(p.requires_grad == before[n][0] and torch.equal(p, before[n][1]) for n, p in after.items())


def test_trained_parameters_of_a_new_head_and_of_all(bases):
    base = load_base(bases / "bert", objective="classification", labels=["a", "b", "c"])
    heads = [*base.heads]
    head = sum(p.numel() for path in heads for p in base.model.get_submodule(path).parameters())
    assert trained(base, "full") == head
    lora, bitfit = (trained(base, m, "attention", heads=()) or 0 for m in ("lora", "bitfit"))
    assert trained(base, ["lora", "bitfit"], {"lora": "attention", "bitfit": "attention"}) == lora + bitfit + head
    assert trained(base, None) == sum(p.numel() for p in base.model.parameters())
    assert trained(base, graft.LoRA(init="eva")) is None  # its ranks are those of the data
    assert base.heads == heads


def test_nothing_is_foretold_of_a_quantised_base(run):
    with pytest.raises(GraftError, match="on a base quantised by int8 is not known before: leave the limit out"):
        misfit(replace(run("lora"), quantise="int8"), memory=2**30)


def test_sizes_are_read_with_their_units():
    assert size("2GiB") == 2**31 and size("1.5 MiB") == 3 * 2**19 and size("64MB") == 64 * 10**6
    for text in ("much", "2 gallons", "0MiB", "-1MiB"):
        with pytest.raises(GraftError, match="is no size"):
            size(text)
