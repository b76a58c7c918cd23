"""Several adapters on one model, trained together: switched, frozen, resumed and saved as one."""

import pytest
import torch
from torch import nn

import graft
import models
from graft.core.delta import METHODS
from graft.core.errors import GraftError
from graft.training import checkpoints, fit
from graft.training.evaluation import choose
from graft.tuning import adapt

QUIET = {"progress": False, "warmup": 0.0}


@pytest.fixture
def train(tokenizer, sentences):
    def run(model, **options):
        texts = [{"text": t} for t in sentences(16)]
        return fit(model, texts, **{"processor": tokenizer, "batch_size": 4, "epochs": 1, **QUIET, **options})

    return run


def chained(model=None, dropout=0.0):
    model = models.llama(attention_dropout=dropout) if model is None else model
    for name, recipe in {
        "lora": graft.LoRA(rank=2, dropout=dropout),
        "ia3": graft.IA3(),
        "dora": graft.DoRA(rank=2),
    }.items():
        models.move(graft.attach(model, recipe, name=name), 0.1)
    return model, *graft.adapters(model).values()


def bits(*adapters):
    return [{k: v.clone() for k, v in a.state_dict().items()} for a in adapters]


def same(a, b):
    return all(torch.equal(a[k], b[k]) for k in a)


class Recorded(torch.optim.SGD):
    """Keeps the gradients that it was given, by parameter."""

    def step(self, closure=None):
        Recorded.last = {id(p): p.grad.clone() for g in self.param_groups for p in g["params"] if p.grad is not None}
        Recorded.held = {id(p) for g in self.param_groups for p in g["params"]}
        return super().step(closure)


def test_a_step_has_the_gradient_of_the_loss_for_each_of_them(train, tokenizer, sentences):
    model, *chain = chained()
    rows = [tokenizer(t + " <eos>")["input_ids"] for t in sentences(16)]
    terms, total = sum(len(r) - 1 for r in rows), 0.0
    for row in rows:
        ids = torch.tensor([row])
        total = total + nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="sum") / terms
    names = {id(p): (a.name, i) for a in chain for i, p in enumerate(a.parameters())}
    parameters = [p for a in chain for p in a.parameters()]
    expected = {names[id(p)]: g for p, g in zip(parameters, torch.autograd.grad(total, parameters))}
    train(model, steps=1, batch_size=16, optimizer=Recorded, clip=None)
    got = {names[key]: g for key, g in Recorded.last.items()}
    assert got.keys() == expected.keys()
    for key, g in expected.items():
        torch.testing.assert_close(got[key], g, rtol=1e-3, atol=1e-3 * float(g.abs().max()))


@pytest.mark.parametrize("way", ["frozen", "switched off"])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_who_is_frozen_or_switched_off_keeps_its_bits_and_the_others_learn(train, way, which):
    model, *chain = chained()
    still = chain[which]
    still.task = {"objective": "its own"}
    still.requires_grad_(way != "frozen")
    if way == "switched off":
        still.disable()
    before = bits(*chain)
    train(model, optimizer="adamw", weight_decay=0.1)
    for adapter, old in zip(chain, before):
        changed = [not torch.equal(v, old[k]) for k, v in adapter.state_dict().items()]
        assert not any(changed) if adapter is still else all(changed)
    assert all(p.requires_grad == (way != "frozen") for p in still.parameters())
    assert still.task == {"objective": "its own"} and chain[which - 1].task["objective"] == "causal-lm"


@pytest.mark.parametrize("way", ["running", "frozen", "switched off"])
def test_schedules_and_penalties_are_those_of_who_is_trained(train, way, monkeypatch):
    stepped, punished = [], []

    def penalty(cls, deltas):
        punished.append(cls.name)
        return sum((p**2).sum() for d in deltas for p in d.parameters())

    for cls in (METHODS["lora"], METHODS["adalora"]):
        steps = classmethod(lambda cls, deltas, progress: stepped.append((cls.name, progress)))
        monkeypatch.setattr(cls, "step", steps)
        monkeypatch.setattr(cls, "penalty", classmethod(penalty))
    model = models.llama()
    graft.attach(model, graft.LoRA(rank=2), name="a")
    other = graft.attach(model, graft.AdaLoRA(rank=2, target_rank=1), name="b")
    if way == "frozen":
        other.requires_grad_(False)
    if way == "switched off":
        other.disable()
    before = bits(other)[0]
    train(model, steps=4)
    both = ["lora", "adalora"] if way == "running" else ["lora"]
    assert [name for name, _ in stepped] == both * 4 and punished == both * 4
    assert [p for name, p in stepped if name == "lora"] == [0.25, 0.5, 0.75, 1.0]
    assert same(other.state_dict(), before) == (way != "running")


class Stop(Exception):
    pass


@pytest.mark.parametrize("at", [1, 3])
def test_a_resumed_run_comes_to_the_bits_of_a_straight_one(train, tmp_path, monkeypatch, at):
    options = {"epochs": 2, "save_every": 1, "learning_rate": 1e-2, "validation": 0.25, "eval_every": 2}
    model, *chain = chained(dropout=0.2)
    chain[1].requires_grad_(False)
    straight = train(model, output=tmp_path / "straight", **options)
    real = checkpoints.save

    def save(folder, step, state):
        real(folder, step, state)
        if step == at:
            raise Stop

    broken, *again = chained(dropout=0.2)
    again[1].requires_grad_(False)
    monkeypatch.setattr(checkpoints, "save", save)
    with pytest.raises(Stop):
        train(broken, output=tmp_path / "stopped", **options)
    monkeypatch.undo()
    fresh, *resumed = chained(dropout=0.2)
    resumed[1].requires_grad_(False)
    result = train(fresh, output=tmp_path / "stopped", resume=True, **options)
    for a, b in zip(chain, resumed):
        assert same(a.state_dict(), b.state_dict())
    assert not same(chain[0].state_dict(), bits(chained()[1])[0])
    strip = [{k: v for k, v in r.items() if k != "seconds"} for r in straight.history]
    assert strip == [{k: v for k, v in r.items() if k != "seconds"} for r in result.history]


def test_a_run_of_another_chain_is_not_gone_on_with(train, tmp_path):
    model, *_ = chained()
    train(model, steps=2, output=tmp_path, save_every=1)
    for names in (["ia3", "lora", "dora"], ["lora", "ia3"]):
        other, *_ = chained()
        graft.activate(other, *names)
        with pytest.raises(GraftError, match=r"the run in .* was another one .*chain of adapters"):
            train(other, steps=2, output=tmp_path, resume=True)


def bypassed(layers):
    """A model of which so many MLPs read the weight of down_proj past its forward, out of sight of their class."""
    model = models.llama()
    for layer in model.model.layers[:layers]:
        host = layer.mlp.down_proj

        def read(x, mlp=layer.mlp, own=host):
            return nn.functional.linear(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x), own.weight)

        layer.mlp.forward = read
    return model


@pytest.mark.parametrize(
    "method", [graft.LoRA(rank=2), graft.AdaLoRA(rank=2, target_rank=1)], ids=lambda r: r.method.name
)
def test_deltas_that_no_gradient_reaches_are_told(train, method):
    """Also where a penalty gives some of their tensors a gradient."""
    model = bypassed(1)
    graft.attach(model, method, "down_proj")
    with pytest.warns(UserWarning, match=r"no gradient reached 1 of the 2 .*layers\.0\.mlp\.down_proj"):
        train(model, steps=2)
    model = bypassed(2)
    graft.attach(model, "ia3", "k_proj", name="other")
    adapter = graft.attach(model, method, "down_proj")
    before = bits(adapter)[0]
    with pytest.raises(GraftError, match=r"no gradient reached 2 of the 2 .*graft\.verify"):
        train(model, steps=2)
    assert same(adapter.state_dict(), before)


# tune


@pytest.mark.parametrize("order", [["lora", "ia3"], ["ia3", "lora"]])
def test_tune_trains_a_list_of_methods_and_saves_them_as_one(tmp_path, tokenizer, sentences, order):
    models.bert(2).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    examples = [{"text": t, "label": "early" if t[0] < "n" else "late"} for t in sentences(16)]
    recipes = {"lora": graft.LoRA(rank=2), "ia3": "ia3"}
    done = graft.tune(
        tmp_path / "base", examples, method=[recipes[n] for n in order], heads="classifier", output=tmp_path / "a",
        epochs=1, learning_rate=1e-2, progress=False,
    )  # fmt: skip
    assert list(done.adapters) == list(graft.adapters(done.base.model)) == order and done.adapter.name == order[-1]
    assert [[p for p, _ in a.heads] for a in done.adapters.values()] == [[], ["classifier"]]
    starts = graft.load_base(tmp_path / "base", objective="classification", examples=examples).model
    for name, adapter in done.adapters.items():
        start = graft.attach(starts, recipes[name], name=name, heads=[p for p, _ in adapter.heads])
        assert not any(torch.equal(v, start.state_dict()[k]) for k, v in adapter.state_dict().items())
    assert (tmp_path / "a" / "history.jsonl").exists() and not (tmp_path / "a.run").exists()
    again = graft.load_adapted(tmp_path / "base", tmp_path / "a")
    said = [graft.predict(b.model, examples, **b.arguments()) for b in (done.base, again)]
    assert said[0] == said[1] and list(graft.adapters(again.model)) == order
    assert again.model.config.id2label == {0: "early", 1: "late"}


def test_one_method_twice_is_numbered(tmp_path, tokenizer, sentences):
    models.llama().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    texts = [{"text": t} for t in sentences(8)]
    twice = [graft.LoRA(rank=2), graft.LoRA(rank=3)]
    done = graft.tune(tmp_path / "base", texts, method=twice, steps=1, progress=False)
    assert {n: a.recipe.hyper["rank"] for n, a in done.adapters.items()} == {"lora": 2, "lora-2": 3}
    with pytest.raises(GraftError, match="targets: no adapter is called 'ia3'; there are lora, lora-2"):
        graft.tune(tmp_path / "base", texts, method=twice, targets={"lora": "qv", "ia3": "mlp"}, steps=1)
    table = {"lora": "q_proj in blocks[1:]", "lora-2": ["k_proj in blocks[1:]", "v_proj"]}
    done = graft.tune(tmp_path / "base", texts, method=twice, targets=table, steps=1, progress=False)
    found = [[path.partition("layers.")[2] for path in a.deltas] for a in done.adapters.values()]
    assert found == [["1.self_attn.q_proj"], ["0.self_attn.v_proj", "1.self_attn.k_proj", "1.self_attn.v_proj"]]
    with pytest.raises(GraftError, match="empty list"):
        graft.tune(tmp_path / "base", texts, method=[])


@pytest.mark.parametrize("method", ["greentrainer", "gps"])
def test_gradients_for_a_choice_pass_a_new_head_of_zeros(tmp_path, tokenizer, sentences, method):
    """What is chosen is what is chosen with a head that is drawn; the head of the model stays as it was."""
    models.bert(2).bert.save_pretrained(tmp_path / "base")  # the head is new
    tokenizer.save_pretrained(tmp_path / "base")
    examples = [{"text": t, "label": "early" if t[0] < "n" else "late"} for t in sentences(16)]
    chosen = []
    for zero in (True, False):
        base = graft.load_base(tmp_path / "base", objective="classification", examples=examples)
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(0)
            base.model.classifier.weight.normal_(std=0.0 if zero else 0.02)
        recipe = graft.Recipe.of(method, **METHODS[method].small)
        made = adapt(base, choose("classification", examples, base.model), examples, recipe, None, None, 0, 16,
                     {"processor": base.processor})["default"]  # fmt: skip
        assert base.heads == ["classifier"] and base.model.classifier.weight.any() == (not zero)
        chosen.append({k: v for k, v in made.state_dict().items() if "classifier" not in k})
    assert chosen[0].keys() == chosen[1].keys()
    assert all(torch.equal(v, chosen[1][k]) for k, v in chosen[0].items())
