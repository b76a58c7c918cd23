"""What can be combined, in pairs. Every delta of a weight meets every initialisation, every selection of parameters, a
quantised base, gradient checkpointing and the compiler; a pair gives what the parts say, or is refused by name.

Methods and initialisations are found by registration, so that a new one is in the matrix by itself.
"""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import graft
import models
from graft import inits, methods
from graft.core.delta import METHODS
from graft.core.factored import INITS
from graft.core.hyper import hyperparameters
from graft.core.sites.quantised import QuantisedSite
from models import move

methods.load()
inits.load()
DELTAS = sorted(
    n for n, c in METHODS.items() if c.__module__.startswith("graft.") and "linear" in c.hosts and c.mergeable()
)
STARTS = sorted(n for n, c in INITS.items() if c.__module__.startswith("graft."))
ELSEWHERE = sorted(n for n, c in METHODS.items() if c.__module__.startswith("graft.") and n not in DELTAS)
BESIDE = [n for n in DELTAS if METHODS[n].__module__.startswith("graft.methods.selection.")]
STARTED = [(n, s) for n in DELTAS for s in STARTS if "init" in hyperparameters(METHODS[n])]
PATHS = ["0", "2"]
each = pytest.mark.parametrize("name", DELTAS)
each_start = pytest.mark.parametrize("name, start", [*((n, None) for n in DELTAS), *STARTED])


class Coded(nn.Module):
    """W = scale code, in int8."""

    def __init__(self, plain):
        super().__init__()
        self.out_features, self.in_features = plain.weight.shape
        scale = plain.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("code", (plain.weight.detach() / scale).round().to(torch.int8))
        self.bias = nn.Parameter(plain.bias.detach().clone())

    def forward(self, x):
        return F.linear(x, self.scale * self.code, self.bias)


class CodedSite(QuantisedSite, hosts=(Coded,)):
    def decode(self):
        return self.module.scale * self.module.code


def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8)).double().eval()
    return model.requires_grad_(False)


def inputs():
    return torch.randn(3, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()


@functools.cache
def statistics(needs):
    if not needs:
        return None
    model = network()
    if "weight" in needs:
        move_base(model)
    return graft.collect(model, [inputs().detach()], needs, PATHS, loss=lambda m, x: m(x).sin().square().mean())


def move_base(model):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(9)))


def attached(model, method, start=None, *, name="default", seed=1, still=False, paths=PATHS):
    """An adapter with the method's small hyperparameters, away from its start unless it is to be `still`."""
    cls = METHODS[method]
    recipe = cls(**cls.small | ({} if start is None else {"init": start, "rank": 2}))
    needs = tuple(dict.fromkeys(cls.asks(recipe.hyper)))
    adapter = graft.attach(model, recipe, paths, name=name, stats=statistics(needs), seed=seed)
    return adapter if still else move(adapter, seed=seed)


def trained(model):
    return [p for a in graft.adapters(model).values() for p in a.parameters() if p.requires_grad]


def outcome(model, x, run=None):
    """The output, and the gradients of x and of all that is trained."""
    y = (run or model)(x)
    probe = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    found = torch.autograd.grad((y * probe).sum(), [x, *trained(model)], allow_unused=True)
    return [y, *(torch.zeros(()) if g is None else g for g in found)]


def equal(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b)


def dense(model, x):
    """What the merged weights of the chains compute."""
    for module in model:
        x = F.linear(x, module.chain.weight, module.chain.bias) if hasattr(module, "chain") else module(x)
    return x


@each
def test_what_takes_no_initialisation_says_so(name):
    for start in STARTS:
        if (name, start) not in STARTED:
            with pytest.raises(graft.GraftError, match=f"^{name} has no hyperparameter 'init'"):
                METHODS[name](**METHODS[name].small, init=start)


@pytest.mark.parametrize("name, start", STARTED)
def test_with_an_initialisation(name, start):
    """The adapted model starts as the initialisation says, and away from there it is a change of the weight."""
    model, x = network(), inputs()
    y = model(x)
    adapter = attached(model, name, start, still=True)
    assert torch.allclose(model(x), y, rtol=1e-6, atol=1e-6) == INITS[start].starts_as_base
    move(adapter)
    equal(outcome(model, x), outcome(model, x, lambda x: dense(model, x)))


@each
def test_with_a_selection_beside_it(name):
    """One outside of the other, in both orders: the dense chain of both changes of the weight."""
    model, x = network()[:1], inputs()
    plain = model(x)
    inner = attached(model, name, paths=["0"])
    alone = model(x)
    for beside in BESIDE:
        try:
            outer = attached(model, beside, name="beside", seed=2, paths=["0"])
            equal(outcome(model, x), outcome(model, x, lambda x: dense(model, x)))
            with outer.disabled():
                assert torch.equal(model(x), alone)
            graft.activate(model, "beside", "default")  # now inside of it
            equal(outcome(model, x), outcome(model, x, lambda x: dense(model, x)))
            graft.activate(model, "default", "beside")
            outer.detach()
        except Exception as error:
            error.add_note(f"{beside} beside {name}")
            raise
    inner.detach()
    assert torch.equal(model(x), plain)


@each_start
def test_on_a_quantised_base(name, start):
    """As on the decoded weight."""
    model, plain, x = network(), network(), inputs()
    for path in map(int, PATHS):
        model[path] = Coded(model[path])
        with torch.no_grad():
            plain[path].weight.copy_(model[path].scale * model[path].code)
    before = graft.fingerprint(model)
    try:
        attached(model, name, start)
    except graft.GraftError as error:
        assert str(error).startswith(name) and "quantised" in str(error), error
        return
    attached(plain, name, start)
    equal(outcome(model, x), outcome(plain, x))
    assert graft.fingerprint(model) == before
    with pytest.raises(graft.GraftError, match=r"^0 is quantised|^2 is quantised"):
        graft.merge(model)


def close(ours, theirs, share):
    """Up to this share of the norm: a layer of torch's int8 rounds its inputs to 7 bits."""
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        assert torch.linalg.vector_norm(a - b) <= share * torch.linalg.vector_norm(b), (a, b)


@each
def test_on_int8_of_torch(name):
    """As on the decoded weight, but that the layer rounds its inputs."""
    model, x = graft.quantise(network()[:1].float(), "int8"), inputs().float().detach().requires_grad_()
    plain = graft.dequantise(copy.deepcopy(model))
    try:
        attached(model, name, paths=["0"])
    except graft.GraftError as error:
        assert str(error).startswith(name) and "quantised" in str(error), error
        return
    attached(plain, name, paths=["0"])
    assert {p.dtype for p in trained(model)} == {torch.float32}
    close(outcome(model, x), outcome(plain, x), share=0.03)


@pytest.mark.parametrize("name", ELSEWHERE)
def test_on_int8_inside_a_transformer(name):
    """What adapts other places than linear layers computes as with decoded weights, but for the rounding of inputs."""
    model = graft.quantise(models.llama(layers=1), "int8")
    plain = graft.dequantise(copy.deepcopy(model))
    try:
        models.attach(model, name, "default")
    except graft.GraftError as error:
        assert str(error).startswith(name) and "quantised" in str(error), error
        return
    models.attach(plain, name, "default")
    found = []
    for each in (model, plain):
        y = each(models.tokens()).logits
        probe = torch.linspace(-1, 1, y.numel()).view_as(y)
        found.append([y, torch.cat([g.flatten() for g in torch.autograd.grad((y * probe).sum(), trained(each))])])
    close(*found, share=0.1)


@pytest.mark.parametrize("name", [n for n in (*DELTAS, *ELSEWHERE) if not METHODS[n].on_codes])
def test_what_trains_weights_themselves_is_refused_on_codes(name):
    """Also where presets pick other sites beside those."""
    model = graft.quantise(models.llama(layers=1), "int8")
    targets = "all-linear" if name == "full" else None
    with pytest.raises(graft.GraftError, match=f"^{name} cannot work at .*: (its weight|a weight in it) is quantised"):
        graft.attach(model, name, targets, **METHODS[name].small)
    assert not graft.adapters(model)


@each_start
def test_with_gradient_checkpointing(name, start):
    model, x = network().train(), inputs()
    attached(model, name, start)
    expect = outcome(model, x)
    for reentrant in (False, True):
        step = functools.partial(checkpoint, use_reentrant=reentrant)
        in_parts = functools.partial(functools.reduce, lambda h, m, step=step: step(m, h), model)
        equal(expect, outcome_of_backward(model, x, in_parts))


def outcome_of_backward(model, x, run):
    """As `outcome`, by `backward`, which is all that reentrant checkpoints know."""
    of = [x, *trained(model)]
    for t in of:
        t.grad = None
    y = run(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return [y, *(torch.zeros(()) if t.grad is None else t.grad for t in of)]


def kinds_of_deltas():
    """One delta of each base class, which stands for a way to compute: the contract compiles every delta by itself."""
    found = {}
    for name in DELTAS:
        found.setdefault(METHODS[name].__mro__[1], name)
    return found.values()


def ways_to_act():
    """One delta of each way to compute with low-rank factors."""
    return {METHODS[name].act: name for name, _ in STARTED}.values()


@pytest.mark.parametrize(
    "name, start, quantised",
    [
        *((n, None, q) for n in kinds_of_deltas() for q in (False, True)),
        *((n, "pissa", False) for n in ways_to_act()),
    ],
)
def test_with_the_compiler(name, start, quantised):
    """Beside another delta, on a plain or a quantised base, or where a part of W is in its factors: the same values and
    gradients."""
    model, x = network()[:1], inputs()
    if quantised:
        model[0] = Coded(model[0])
    try:
        attached(model, name, start, paths=["0"])
    except graft.GraftError as error:
        assert quantised and "quantised" in str(error)
        return
    attached(model, "lora", name="beside", seed=2, paths=["0"])
    torch._dynamo.reset()
    backend = "eager" if start else "aot_eager"  # what is traced of a start is its forward
    equal(outcome(model, x, torch.compile(model, backend=backend)), outcome(model, x))
