"""LoRA+: which parameters learn faster, against PEFT, and how much faster in the loop."""

import pytest
import torch

import graft
import models
from graft.training import optimizers

peft = pytest.importorskip("peft")


def test_groups_are_those_of_peft():
    from peft.optimizers import create_loraplus_optimizer

    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
    theirs = peft.get_peft_model(models.llama(), config)
    wanted = create_loraplus_optimizer(theirs, torch.optim.SGD, lr=0.1, loraplus_lr_ratio=16)
    names = {p: n for n, p in theirs.named_parameters()}
    fast = {names[p] for g in wanted.param_groups if g["lr"] > 0.1 for p in g["params"]}
    slow = {names[p] for g in wanted.param_groups if g["lr"] == 0.1 for p in g["params"]}
    assert {g["lr"] for g in wanted.param_groups if g["params"]} == {0.1, 1.6}

    model = models.llama()
    adapter = graft.attach(model, graft.LoRA(rank=2), r".*(q_proj|down_proj)")
    ours = optimizers.build("sgd", adapter.parameters(), learning_rate=0.1, ups=adapter.ups(), loraplus_lr_ratio=16)
    assert sorted(g["peak"] for g in ours.param_groups) == [0.1, 1.6]
    called = {
        p: f"base_model.model.{path}.lora_{n}.default.weight"
        for path, d in adapter.deltas.items()
        for n, p in d.named_parameters()
    }
    for group in ours.param_groups:
        assert {called[p] for p in group["params"]} == (fast if group["lr"] > 0.1 else slow)


def test_b_inside_other_methods_is_found():
    model = models.llama()
    adapter = graft.attach(model, graft.DoRA(rank=2), "q_proj")
    assert {id(p) for p in adapter.ups()} == {id(d.low.B) for d in adapter.deltas.values()}


def test_one_step_of_the_loop_moves_b_so_much_faster():
    moved = {}
    for ratio in (None, 8.0):
        model = models.llama(vocab_size=200)
        adapter = graft.attach(model, graft.LoRA(rank=2), "q_proj", seed=3)
        with torch.no_grad():
            for d in adapter.deltas.values():
                d.B.fill_(0.1)
        before = [p.detach().clone() for p in adapter.parameters()]
        graft.fit(
            model, [{"text": "the film was very good"}] * 4, processor=models.tokenizer(), objective="causal-lm",
            steps=1, learning_rate=1.0, loraplus_lr_ratio=ratio, schedule="constant", warmup=0.0, clip=None,
            optimizer="sgd", progress=False,
        )  # fmt: skip
        ups = {id(p) for p in adapter.ups()}
        moved[ratio] = [(id(p) in ups, p.detach() - b) for p, b in zip(adapter.parameters(), before)]
    for (up, plain), (_, fast) in zip(moved[None], moved[8.0]):
        torch.testing.assert_close(fast, (8 if up else 1) * plain, rtol=1e-3, atol=2e-7)  # rounding of p
        assert plain.abs().max() > 1e-5


def test_a_method_without_factors_is_refused():
    model = models.llama()
    adapter = graft.attach(model, "ia3")
    with pytest.raises(graft.GraftError, match="loraplus_lr_ratio is for methods with factors"):
        optimizers.build("sgd", adapter.parameters(), learning_rate=0.1, ups=adapter.ups(), loraplus_lr_ratio=4)
