"""Gradient dropout: entries of a gradient that are against what the base says are left out, as often as they should."""

import copy

import pytest
import torch
from small import Tokenizer
from torch import nn

import graft
from graft.core.errors import GraftError
from graft.training.gradient_dropout import GradientDropout
from models import bert, llama, tokenizer


def test_entries_stay_with_the_probability_of_their_agreement():
    g = torch.tensor([1.0, -2.0, 1.0, 1.0, -1.0, 0.0, 3.0])[:, None].repeat(1, 20000)
    k = torch.tensor([0.5, -9.0, -3.0, -1.0, 1.0 / 3, -1.0, 0.0])[:, None].repeat(1, 20000)
    chance = torch.tensor([1.0, 1.0, 0.25, 0.5, 0.75, 0.5, 1.0])
    for strength in (1.0, 0.4):
        p = nn.Parameter(torch.zeros_like(g))
        p.grad = g.clone()
        dropping = GradientDropout(nn.Module(), [p], strength)
        dropping.known[p] = k
        torch.manual_seed(0)
        dropping.apply()
        kept = p.grad == g
        assert kept[[0, 1, 6]].all()
        torch.testing.assert_close(p.grad[~kept], ((1 - strength) * g)[~kept])
        rates = kept.float().mean(1)
        torch.testing.assert_close(rates[[2, 3, 4]], chance[[2, 3, 4]], atol=0.015, rtol=0)
        assert dropping.known[p] is None


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_run_compares_with_the_base_itself(accumulation, monkeypatch):
    texts, seen = [{"text": "2 3 4 5 6"}, {"text": "7 8 9 10 11"}], []
    apply = GradientDropout.apply
    monkeypatch.setattr(
        GradientDropout,
        "apply",
        lambda self: (seen.append({p: (p.grad.clone(), k) for p, k in self.known.items()}), apply(self)),
    )
    model = llama().double()
    adapter = graft.attach(model, graft.RAMT(strength=0.0), "q_proj")
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.01 * torch.randn_like(p))
    reference = copy.deepcopy(model)
    graft.fit(model, texts, processor=Tokenizer(), steps=1, batch_size=2 // accumulation, precision="fp32", clip=None,
              gradient_accumulation=accumulation, gradient_dropout=1, progress=False)  # fmt: skip
    ids = torch.tensor([[int(t) for t in row["text"].split()] + [1] for row in texts])
    with torch.no_grad(), graft.disabled(reference):
        base = reference(ids).logits[:, :-1].softmax(-1)
    said = reference(ids).logits[:, :-1].log_softmax(-1)
    own = graft.adapters(reference)["default"].parameters()
    distance = (base * (base.log() - said)).sum(-1)
    loss = -said.gather(-1, ids[:, 1:, None])[..., 0]
    for value, place in ((loss, 0), (distance, 1)):
        for wanted, got in zip(torch.autograd.grad(value.mean(), own, retain_graph=True), seen[0].values()):
            torch.testing.assert_close(got[place], wanted)
    assert len(seen) == 1


def test_what_it_has_no_meaning_for_is_refused():
    model = bert(labels=1)
    graft.attach(model, graft.LoRA(rank=2), "qv")
    data, run = [{"text": "good film", "label": 0.5}], dict(processor=tokenizer(), steps=1, progress=False)
    with pytest.raises(GraftError, match="objectives over classes or tokens, not for regression"):
        graft.fit(model, data, objective="regression", gradient_dropout=1, **run)
    for value in (0, 1.5):
        with pytest.raises(GraftError, match=r"gradient_dropout is .*, not"):
            graft.fit(model, data, objective="regression", gradient_dropout=value, **run)
