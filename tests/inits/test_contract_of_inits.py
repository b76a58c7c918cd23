"""What every initialisation keeps with every low-rank method, both found by registration."""

import copy
import re

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import graft
from graft import inits, methods
from graft.core.factored import INITS, Initialised, initialisation
from graft.core.hyper import hyperparameters
from models import llama, move, tokens

methods.load()
inits.load()
NAMES = sorted(n for n, cls in INITS.items() if cls.__module__.startswith("graft."))
METHODS = sorted(
    n for n, cls in graft.METHODS.items() if issubclass(cls, Initialised) and "init" in hyperparameters(cls)
)
RANK = 2


class Model(nn.Module):
    def __init__(self, host):
        super().__init__()
        self.host = host

    def forward(self, x):
        return self.host(x)


def hosts(dtype=torch.float64):
    torch.manual_seed(0)
    x = torch.randn(3, 5, 8, dtype=dtype)
    cases = {
        "linear": (nn.Linear(8, 12, dtype=dtype), x),
        "conv1d-of-gpt2": (Conv1D(12, 8).to(dtype), x),
        "conv": (nn.Conv2d(4, 12, 2, groups=2, dtype=dtype), torch.randn(3, 4, 6, 6, dtype=dtype)),
        "embedding": (nn.Embedding(16, 12, dtype=dtype), torch.randint(0, 16, (3, 5))),
    }
    return {label: (Model(host), x) for label, (host, x) in cases.items()}


def loss(model, x):
    return model(x).sin().square().mean()


def begun(name, method, model, x, seed=0, **hyper):
    """A copy of the model with an adapter that starts as the initialisation says."""
    model, cls = copy.deepcopy(model).eval(), graft.METHODS[method]
    recipe = cls(**cls.small | dict(rank=RANK, init=name) | hyper)
    original = copy.deepcopy(model)
    with torch.no_grad():  # for what makes up for a quantised base
        original.host.weight.add_(0.1 * torch.randn_like(original.host.weight))
    needs = cls.asks(recipe.hyper)
    stats = graft.collect(original if needs == ("weight",) else model, [x], needs, "host", loss=loss) if needs else None
    return model, graft.attach(model, recipe, "host", seed=seed, stats=stats)


def kinds():
    found = {label: graft.core.site.kind_of(model.host) for label, (model, _) in hosts().items()}
    return [(n, m, label) for n in NAMES for m in METHODS for label, kind in found.items() if kind in INITS[n].hosts]


each = pytest.mark.parametrize("name, method, host", kinds())


@each
def test_starts_as_it_declares(name, method, host):
    model, x = hosts()[host]
    adapted, adapter = begun(name, method, model, x)
    same = torch.allclose(adapted(x), model(x), rtol=1e-6, atol=1e-6)
    assert same == INITS[name].starts_as_base
    random, _ = begun("random", method, model, x)
    ours = adapter.state_dict()
    theirs = graft.adapters(random)["default"].state_dict()
    assert any(not torch.equal(ours[k], theirs[k]) for k in theirs)  # it is another start than the method's own


@each
def test_trained_it_is_one_change_of_the_weight(name, method, host, tmp_path):
    model, x = hosts()[host]
    adapted, adapter = begun(name, method, model, x)
    move(adapter)
    y = adapted(x)
    delta = adapter.deltas["host"]
    site = delta.site
    torch.testing.assert_close(y, site.apply(x, delta.weight(site.weight), site.bias))
    with torch.no_grad():
        torch.testing.assert_close(adapted(x), y)
    gradient = torch.autograd.grad(y.sin().sum(), [p for p in adapter.parameters() if p.requires_grad])
    dense = site.apply(x, delta.weight(site.weight), site.bias)
    own = [p for p in adapter.parameters() if p.requires_grad]
    for a, b in zip(gradient, torch.autograd.grad(dense.sin().sum(), own)):
        torch.testing.assert_close(a, b)
    with graft.merge(adapted):
        torch.testing.assert_close(adapted(x), y)

    # Its file needs no statistics, and gives the same bits.
    adapter.save(tmp_path / "adapter")
    again = copy.deepcopy(model).eval()
    loaded = graft.load(again, tmp_path / "adapter", trainable=True)
    assert torch.equal(again(x), y)
    assert loaded.recipe.hyper == adapter.recipe.hyper

    # A row of a batch beside another start.
    for p in adapter.parameters():
        p.requires_grad_(False)
    other, second = begun("random", method, model, x, seed=1)
    move(second, seed=2)
    expect = other(x)
    second.detach()
    second.save(tmp_path / "second")
    graft.load(adapted, tmp_path / "second", name="second")
    with torch.no_grad(), graft.route(adapted, ["default", None, "second"]):
        rows = adapted(x)
    for row, value in zip(rows, (y[0], model(x)[1], expect[2])):
        torch.testing.assert_close(row, value)
    graft.adapters(adapted)["second"].detach()
    adapter.detach()
    assert torch.equal(adapted(x), model(x))  # the base was never written to


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NAMES)
def test_half_precision(name, method):
    model, x = hosts(torch.bfloat16)["linear"]
    adapted, adapter = begun(name, method, model, x)
    assert {t.dtype for t in adapter.state_dict().values() if t.is_floating_point()} == {torch.float32}
    if INITS[name].starts_as_base:
        torch.testing.assert_close(adapted(x), model(x), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("method", METHODS)
def test_a_start_by_module(method):
    model = llama()
    cls = graft.METHODS[method]
    hyper = cls.small | dict(rank=2, init={"q_proj": "pissa", "v_proj": "olora", "*": "random"})
    adapter = graft.attach(model, cls(**hyper), ["q_proj", "k_proj", "v_proj"])
    begun = {path.rpartition(".")[2] for path in adapter.deltas for k in adapter.deltas[path].state_dict() if "A0" in k}
    assert begun == {"q_proj", "v_proj"}


@pytest.mark.parametrize("name", NAMES)
def test_is_documented(name):
    cls = INITS[name]
    assert "=" in cls.__doc__ and "[" in cls.__doc__
    assert cls.papers and all(p.url.startswith("https://") for p in cls.papers)
    assert all(h.kinds and h.doc for h in hyperparameters(cls).values())
    known = vars(cls).get("known", "")
    assert known.endswith(".") and len(re.findall(r"\.(?:\s|$)", known)) <= 2
    assert re.search("author|documentation|measured", known), f"{name}: who says so?"


@pytest.mark.parametrize(
    ("init", "match"),
    [
        ("pisa", "no initialisation is called 'pisa'; there are random, corda"),
        ("random,rank=1", "no initialisation is called 'random'"),
        ("corda,mode=both", "mode must be 'instruction' or 'knowledge', not 'both'"),
        ("corda,mode", "the initialisation corda has mode=..., not 'mode'"),
        ("olora,niter=2", "the initialisation olora has no options, not 'niter=2'"),
        ("lora_ga,gamma=0", "gamma must be float, above 0, not 0"),
    ],
)
def test_a_bad_start_is_refused_before_anything_is_built(init, match):
    with pytest.raises(graft.GraftError, match=f"lora: init='{init}' is refused: .*{match}"):
        graft.LoRA(init=init)


def test_what_cannot_be_is_refused_at_construction():
    with pytest.raises(graft.GraftError, match=r"pissa finds 32 directions at .*, and 40 are needed: lower the rank"):
        graft.attach(llama(), graft.LoRA(rank=40, init="pissa"), "q_proj")
    with pytest.raises(graft.GraftError, match=r"orthogonal: the rank must be even at .*, not 3"):
        graft.attach(llama(), graft.LoRA(rank=3, init="orthogonal"), "q_proj")
    with pytest.raises(
        graft.GraftError, match=r"needs the statistic input_components:4 at .*: pass stats=graft.collect"
    ):
        graft.attach(llama(), graft.LoRA(rank=2, init="eva"), "q_proj")
    model = llama()
    stats = graft.collect(model, [tokens()], ["weight_grad"], "q_proj", loss=lambda m, b: m(b).logits.square().mean())
    with pytest.raises(graft.GraftError, match=r"lora_ga finds 32 directions at .*, and 34 are needed"):
        graft.attach(model, graft.LoRA(rank=17, init="lora_ga"), "q_proj", stats=stats)
    stats = {"model.embed_tokens": {"input_covariance": torch.eye(50)}}
    with pytest.raises(
        graft.GraftError, match=r"the initialisation corda is for linear; model.embed_tokens is a embedd"
    ):
        graft.attach(llama(), graft.LoRA(rank=2, init="corda"), "embed_tokens", stats=stats)


def test_options_are_read_once_and_kept_as_written():
    assert initialisation("corda,mode=knowledge") is initialisation("corda,mode=knowledge")
    assert initialisation("corda,mode=knowledge").mode == "knowledge"
    assert graft.LoRA(init="eva,rho=1").hyper["init"] == "eva,rho=1"
