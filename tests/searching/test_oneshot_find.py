"""Whole searches on tiny models: what trains what, and that a change that was planted is found."""

import random
import sys

import pytest
import torch
from torch import nn

import graft
import models
from graft.core import progress
from graft.models import Base
from graft.searching.oneshot import Budget, find
from graft.searching.oneshot.evolution import evolve
from graft.searching.oneshot.mixed import Space, mixed
from graft.searching.oneshot.supernet import Member, Supernet
from graft.training import fit
from graft.training.data import divided

TOKENIZER = models.tokenizer()


def texts(count, seed=0):
    draw = random.Random(seed)
    return [" ".join(draw.choices(models.WORDS.split(), k=6)) for _ in range(count)]


class Recorded(torch.optim.SGD):
    """Keeps the gradients that it was given."""

    def step(self, closure=None):
        Recorded.last = {id(p): None if p.grad is None else p.grad.clone() for p in self.param_groups[0]["params"]}
        return super().step(closure)


def test_logits_learn_from_one_part_of_the_data_and_options_from_the_other():
    model = models.llama(vocab_size=len(TOKENIZER))
    adapter = graft.attach(model, mixed(Space([None, graft.LoRA(rank=2)]), "outputs", share=0.25), "qv")
    models.move(adapter)
    rows = [{"text": t} for t in texts(8)]

    def gradient(part, p):
        sums, terms = 0, 0
        for row in part:
            ids = torch.tensor([[*TOKENIZER(row["text"])["input_ids"], TOKENIZER.eos_token_id]])
            sums = sums + nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="sum")
            terms += ids.shape[1] - 1
        return torch.autograd.grad(sums / terms, p)[0]

    delta = next(iter(adapter.deltas.values()))
    own, logits = delta.largest["lora"].B, adapter.shared.logits
    train, aside = divided(rows, 2, seed=0)
    wanted = gradient(train, own), gradient(aside, logits)
    fit(model, rows, processor=TOKENIZER, steps=1, batch_size=8, clip=None, optimizer=Recorded, learning_rate=1e-12,
        precision="fp32", warmup=0.0, progress=False)  # fmt: skip
    for p, g in zip((own, logits), wanted):
        torch.testing.assert_close(Recorded.last[id(p)], g, rtol=1e-3, atol=1e-7)


def test_a_supernet_that_goes_on_comes_to_the_same_bits(tmp_path):
    def run(folder, **options):
        model = models.llama(vocab_size=len(TOKENIZER))
        adapter = graft.attach(model, mixed(Space([None, graft.LoRA(rank=2), graft.LoRA(rank=4)])), "qv")
        fit(model, [{"text": t} for t in texts(10)], processor=TOKENIZER, steps=6, batch_size=2, save_every=1,
            learning_rate=1e-2, output=folder, progress=False, **options)  # fmt: skip
        return adapter.state_dict()

    class Killed(Exception):
        pass

    class Dies(torch.optim.Adam):
        left = 5

        def step(self, closure=None):
            Dies.left -= 1
            if not Dies.left:
                raise Killed
            return super().step(closure)

    whole = run(tmp_path / "whole", optimizer=torch.optim.Adam)
    Dies.left = 5  # the first step is the trial of the optimizer
    with pytest.raises(Killed):
        run(tmp_path / "cut", optimizer=Dies)
    Dies.left = -1
    again = run(tmp_path / "cut", optimizer=Dies)
    assert all(torch.equal(again[k], v) for k, v in whole.items())


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 8))


def loss(model, data):
    return (model(data[0]) - data[1]).square().mean()


def train(model, adapters, data, steps, rate=2e-2):
    tuner = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=rate)
    for step in range(1, steps + 1):
        tuner.zero_grad()
        loss(model, data).backward()
        for adapter in adapters:
            adapter.step(step / steps)
        for group in tuner.param_groups:
            group["lr"] = rate * (1 - step / steps) + 1e-5
        tuner.step()


def shifted(where, count, seed):
    """What `network` makes of inputs which have changed places since (early), or its outputs in other places (head)."""
    x = torch.randn(count, 12, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        y = network()(x)
    order = torch.Generator().manual_seed(5)
    return (
        (x[:, torch.randperm(12, generator=order)], y)
        if where == "early"
        else (x, y[:, torch.randperm(8, generator=order)])
    )


@pytest.mark.parametrize("where, layer", [("early", "0"), ("head", "4")])
def test_nfts_trains_where_the_shift_is_and_so_learns_more_from_few_examples(where, layer):
    model, layers, lora = network(), ["0", "2", "4"], graft.LoRA(rank=2)
    few, held, test = (shifted(where, n, seed) for n, seed in ((40, 10), (60, 20), (500, 30)))
    members = {"full": Member(Space([None, "full"]), layers), "adapter": Member(Space([None, lora]), layers)}
    with Supernet(Base("network", model, None), members) as net, torch.no_grad():
        with torch.enable_grad():
            train(model, net.adapters.values(), few, 600)

        def score(path):
            net.use(path)
            return -float(loss(model, held))

        paths = evolve(net.draw, net.mutate, net.cross, score, lambda p: 0 < net.parameters(p) <= 70, scored=60)
        found = net.found(next(iter(paths)))

    def error(recipes, targets):
        fresh = network()
        made = [graft.attach(fresh, r, t, name=f"a{i}") for i, (r, t) in enumerate(zip(recipes, targets))]
        if made:
            train(fresh, made, few, 400)
        with torch.no_grad():
            return float(loss(fresh, test))

    assert (found.recipes[0].method.name, found.targets[0]) == ("full", [layer])
    others = {"frozen": ([], []), "all adapters": ([lora], [layers]), "all tuned": (["full"], [layers])}
    assert all(error(found.recipes, found.targets) < error(*other) for other in others.values())


def test_a_search_reads_out_what_can_be_tuned():
    """From data to recipes by `find`, and these back into an adapter."""
    model = models.bert(labels=4, vocab_size=len(TOKENIZER), num_hidden_layers=2)
    rows = [{"text": t, "label": t[0] if t[0] in "tgb" else "other"} for t in texts(60)]
    base = Base("tiny", model, TOKENIZER, "classification", heads=["classifier"])
    before = {k: t.clone() for k, t in model.state_dict().items()}
    for name, options in {
        "noah": {"sizes": (1, 2)},
        "nfts": {},
        "glora": {"rank": 2},
        "darts": {},
        "tanglenas": {},
    }.items():
        budget = Budget(steps=3, cap=4000, paths=6, training={"batch_size": 8})
        found = find(name)(**options).find(base, rows, budget)
        assert 0 < found.parameters <= 4000 and found.table[0]["parameters"] == found.parameters
        assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())
        made = [graft.attach(model, r, t, name=f"a{i}") for i, (r, t) in enumerate(zip(found.recipes, found.targets))]
        assert sum(p.numel() for a in made for p in a.parameters()) == found.parameters
        for adapter in reversed(made):
            adapter.detach()


@pytest.mark.parametrize("told", [True, False])
def test_how_many_paths_are_scored_is_shown_on_a_terminal(told, monkeypatch, capsys):
    monkeypatch.setattr(progress, "QUIET", -1.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    model = models.bert(labels=2, vocab_size=len(TOKENIZER), num_hidden_layers=2)
    rows = [{"text": t, "label": "ab"[i % 2]} for i, t in enumerate(texts(20))]
    base = Base("tiny", model, TOKENIZER, "classification", heads=["classifier"])
    find("nfts")().find(base, rows, Budget(steps=1, paths=3, training={"batch_size": 8, "progress": told}))
    assert ("scoring paths" in capsys.readouterr().err) == told
