"""Examples that a run keeps aside for methods which weigh losses: which data train what, and that a run goes on."""

import pytest
import torch
from torch import nn

import graft
import models
from graft.training import fit
from graft.training.data import divided


def total(model, rows, tokenizer):
    """The mean loss over all tokens of the rows, one row at a time."""
    sums, terms = 0, 0
    for row in rows:
        ids = torch.tensor([[*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id]])
        sums = sums + nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="sum")
        terms += ids.shape[1] - 1
    return sums / terms


class Recorded(torch.optim.SGD):
    """Keeps the gradients that it was given."""

    def step(self, closure=None):
        Recorded.last = {id(p): p.grad.clone() for g in self.param_groups for p in g["params"]}
        return super().step(closure)


def test_vectors_learn_from_one_part_of_the_data_and_values_from_the_other(tokenizer, sentences):
    model = models.llama()
    adapter = models.move(graft.attach(model, graft.BiLoRA(rank=2, share=0.5, gamma=0.0), "qv"))
    rows = [{"text": t} for t in sentences(8)]
    fit(model, rows, processor=tokenizer, steps=1, batch_size=8, clip=None, optimizer=Recorded, learning_rate=1e-9,
        precision="fp32", warmup=0.0, progress=False)  # fmt: skip
    for part, ends in zip(divided(rows, 4, seed=0), (("P", "Q"), ("e",))):
        for delta in adapter.deltas.values():
            mine = [getattr(delta, n) for n in ends]
            for p, g in zip(mine, torch.autograd.grad(total(model, part, tokenizer), mine)):
                torch.testing.assert_close(Recorded.last[id(p)], g, rtol=1e-3, atol=1e-6)


METHODS = graft.BiLoRA(rank=2, share=0.4), graft.ALoRA(rank=2, limit=3, rounds=2, examples=4, warmup=0.2)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_goes_on_comes_to_the_same_bits(method, tokenizer, sentences, tmp_path):
    def run(folder, steps, **options):
        model = models.llama(attention_dropout=0.2)
        adapter = graft.attach(model, method, "qv")
        fit(model, [{"text": t} for t in sentences(10)], processor=tokenizer, steps=steps, batch_size=2, save_every=1,
            learning_rate=1e-2, output=folder, progress=False, warmup=0.0, **options)  # fmt: skip
        return adapter.state_dict()

    class Killed(Exception):
        pass

    class Dies(torch.optim.Adam):
        left = 4

        def step(self, closure=None):
            Dies.left -= 1
            if not Dies.left:
                raise Killed
            return super().step(closure)

    whole = run(tmp_path / "whole", 5, optimizer=torch.optim.Adam)
    Dies.left = 4  # the first step is the trial of the optimizer
    with pytest.raises(Killed):
        run(tmp_path / "cut", 5, optimizer=Dies)
    Dies.left = -1
    again = run(tmp_path / "cut", 5, optimizer=Dies)
    assert all(torch.equal(again[k], v) for k, v in whole.items())


def test_ranks_move_by_the_loss_of_the_part_that_is_not_trained_on(tokenizer, sentences, monkeypatch):
    rows, model = [{"text": t} for t in sentences(9)], models.llama(attention_dropout=0.5)
    adapter = models.move(graft.attach(model, graft.ALoRA(rank=4, limit=8, rounds=2, examples=4, warmup=0.5), "qv"))
    seen, scores = [], type(adapter.deltas["model.layers.0.self_attn.q_proj"]).scores

    def spied(cls, deltas, trial):
        mean = total(model.eval(), divided(rows, 4, seed=0)[1], tokenizer)
        model.train()
        seen.append((trial.loss(), mean.item()))
        return scores(deltas, trial)

    monkeypatch.setattr(adapter.recipe.method, "scores", classmethod(spied))
    fit(model, rows, processor=tokenizer, steps=4, batch_size=2, learning_rate=1e-3, precision="fp32", progress=False)
    assert len(seen) == 2 and all(a == pytest.approx(b, rel=1e-5) for a, b in seen)
    assert all(int(d.done) == 2 for d in adapter.deltas.values())
    assert {int(d.keep.sum()) for d in adapter.deltas.values()} != {4}


@pytest.mark.parametrize("method", [graft.BiLoRA(rank=2), graft.ALoRA(examples=3)])
def test_too_few_examples_are_refused(method, tokenizer):
    model = models.llama()
    graft.attach(model, method, "qv")
    with pytest.raises(graft.GraftError, match=r"of 1 training examples [13] are kept aside"):
        fit(model, [{"text": "a b c"}], processor=tokenizer, steps=1, progress=False)
