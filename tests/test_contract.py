"""The contract which every method keeps. A new method file is covered without touching this one: methods are found by
registration, and run on every kind of host which they declare."""

import copy
import inspect
import io
import pickle
import re
import warnings

import pytest
import torch
import torch._dynamo.testing
from torch import nn
from torch.utils.checkpoint import checkpoint

import graft
from graft import methods
from graft.core.delta import METHODS, Delta
from graft.core.host import base_modules, base_parameters
from graft.core.hyper import hyperparameters
from graft.core.site import Site, site_for

transformers = pytest.importorskip("transformers")
from transformers.pytorch_utils import Conv1D  # noqa: E402

methods.load()
NAMES = sorted(n for n, cls in METHODS.items() if cls.__module__.startswith("graft."))
BIG = 64  # width of the host on which memory is looked at


class Model(nn.Module):
    """A model of one host, so that the target is always "host"."""

    def __init__(self, host: nn.Module):
        super().__init__()
        self.host = host

    def forward(self, x):
        return self.host(x)


class MLP(nn.Module):
    """A host of kind "module": hidden states to hidden states."""

    def __init__(self, width=8, dtype=None):
        super().__init__()
        self.up, self.down = nn.Linear(width, 12, dtype=dtype), nn.Linear(12, width, dtype=dtype)

    def forward(self, hidden_states):
        return self.down(torch.tanh(self.up(hidden_states)))


class Llama(nn.Module):
    """A whole decoder, for methods that work on the attention product or on the model itself."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        config = transformers.LlamaConfig(
            hidden_size=16, num_hidden_layers=2, intermediate_size=24, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=20, use_cache=False,
        )  # fmt: skip
        self.host = transformers.LlamaForCausalLM(config).to(dtype)

    def forward(self, x):
        return self.host(input_ids=x).logits


def hosts(dtype=torch.float64) -> dict:
    """{label: (kind, model, target, input)}"""
    torch.manual_seed(0)
    x = torch.randn(3, 5, 8, dtype=dtype)
    images = torch.randn(3, 4, 6, 6, dtype=dtype)
    ids = torch.randint(0, 16, (3, 5))
    cases = {
        "linear": ("linear", nn.Linear(8, 12, dtype=dtype), x),
        "linear-without-bias": ("linear", nn.Linear(8, 12, bias=False, dtype=dtype), x),
        "conv1d-of-gpt2": ("linear", Conv1D(12, 8).to(dtype), x),
        "conv2d": ("conv", nn.Conv2d(4, 12, 2, padding=1, dtype=dtype), images),
        "conv2d-grouped": ("conv", nn.Conv2d(4, 12, 2, groups=2, bias=False, dtype=dtype), images),
        "embedding": ("embedding", nn.Embedding(16, 12, dtype=dtype), ids),
        "layernorm": ("norm", nn.LayerNorm(8, dtype=dtype), x),
        "rmsnorm": ("norm", nn.RMSNorm(8, dtype=dtype), x),
        "module": ("module", MLP(dtype=dtype), x),
    }
    for _, host, _ in cases.values():
        with torch.no_grad():
            for p in host.parameters():
                p.add_(0.1 * torch.randn_like(p))
    made = {label: (kind, Model(host), "host", data) for label, (kind, host, data) in cases.items()}
    torch.manual_seed(0)
    llama = Llama(dtype)
    made["attention"] = ("attention", llama, r"host\.model\.layers\.\d\.self_attn", ids)
    made["model"] = ("model", llama.host, "", ids)
    return made


def statistics(name, model, target, x, **kw):
    """What a method with its small hyperparameters asks for."""
    cls = METHODS[name]
    needs = cls.asks(cls(**cls.small | kw).hyper)
    return graft.collect(model, [x], needs, target, loss=lambda m, b: m(b).square().mean()) if needs else None


def adapt(name, model, target, x, jitter=0.3, **kw):
    """A copy of the model with an adapter whose tensors are away from their start."""
    model = copy.deepcopy(model).eval()
    stats = statistics(name, model, target, x, **kw)
    adapter = graft.attach(model, name, target, stats=stats, **(METHODS[name].small | kw))
    move(adapter, jitter)
    return model, adapter


def move(adapter, jitter=0.3, seed=1):
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(jitter * torch.randn_like(p))


def run(model, x):
    out = model(x)
    return out if isinstance(out, torch.Tensor) else out.logits


def fitting(name) -> list[str]:
    """The hosts on which a method works: of a declared kind, and not refused for a reason of its own."""
    cls = METHODS[name]
    return [
        label
        for label, (kind, model, target, x) in hosts().items()
        if kind in cls.hosts and not cls.refuses(_site(model, target, cls))
    ]


def _site(model, target, cls) -> Site:
    path, module = graft.core.targets.resolve(model, target, cls.hosts)[0]
    return site_for(path, module, cls.hosts)


import graft.core.targets  # noqa: E402

FITS = {name: fitting(name) for name in NAMES}
CASES = [(n, h) for n in NAMES for h in FITS[n]]
MERGEABLE = [(n, h) for n, h in CASES if METHODS[n].mergeable()]
each_case = pytest.mark.parametrize("name, host", CASES)
WITH_WEIGHT = [(n, h) for n, h in MERGEABLE if h != "module"]
each_weight = pytest.mark.parametrize("name, host", WITH_WEIGHT)
each_merge = pytest.mark.parametrize("name, host", MERGEABLE)
each_first = pytest.mark.parametrize("name", NAMES)


@each_first
def test_works_somewhere(name):
    assert FITS[name], f"{name} declares {METHODS[name].hosts} and works on none of them"


@each_case
def test_starts_as_base(name, host):
    _, model, target, x = hosts()[host]
    adapted, _ = adapt(name, model, target, x, jitter=0)
    same = torch.allclose(run(adapted, x), run(model.eval(), x), rtol=1e-6, atol=1e-6)
    assert same == METHODS[name].starts_as_base


@each_case
def test_gradients_reach_the_delta_and_only_it(name, host):
    _, model, target, x = hosts()[host]
    adapted, adapter = adapt(name, model, target, x)
    run(adapted, x).sin().sum().backward()
    for key, p in _parameters(adapter):
        assert p.grad is not None and p.grad.abs().sum() > 0, f"no gradient at {key}"
    own = {id(p) for p in adapter.parameters()}
    assert all(p.grad is None for p in adapted.parameters() if id(p) not in own)


def _parameters(adapter):
    return [
        (f"{path}:{n}", p) for path, m in adapter.modules().items() for n, p in m.named_parameters() if p.requires_grad
    ]


@each_weight
def test_activation_path_is_the_weight_path(name, host):
    _, model, target, x = hosts()[host]
    adapted, adapter = adapt(name, model, target, x)
    delta = next(iter(adapter.deltas.values()))
    inputs = adapter.parameters()
    if x.is_floating_point():
        x = x.clone().requires_grad_()
        inputs = [x, *inputs]
    site = delta.site
    ours, ref = run(adapted, x), site.apply(x, delta.weight(site.weight), delta.bias(site.bias))
    torch.testing.assert_close(ours, ref)
    theirs = torch.autograd.grad(ref.sin().sum(), inputs, allow_unused=True)
    for a, r in zip(torch.autograd.grad(ours.sin().sum(), inputs), theirs):
        torch.testing.assert_close(a, r)


@each_merge
def test_merged_is_adapted_and_undone_is_base(name, host):
    _, model, target, x = hosts()[host]
    adapted, _ = adapt(name, model, target, x)
    expect = run(adapted, x)
    plain = copy.deepcopy(model)
    plain.load_state_dict(graft.merged_state_dict(adapted))
    torch.testing.assert_close(run(plain.eval(), x), expect)
    before = {n: (p, p.detach().clone()) for n, p in adapted.named_parameters()}
    with graft.merge(adapted):
        torch.testing.assert_close(run(adapted, x), expect)
    after = dict(adapted.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[n] is p and torch.equal(p, value) for n, (p, value) in before.items())
    assert torch.equal(run(adapted, x), expect)


@each_case
def test_detach_leaves_no_trace(name, host):
    _, model, target, x = hosts()[host]
    model = copy.deepcopy(model).eval()
    first = next(iter(model.parameters()))
    first.requires_grad_(False)  # a flag of the user's, to come back as it was
    picture = _picture(model)
    y = run(model, x)
    adapted, adapter = model, None
    adapter = graft.attach(adapted, name, target, stats=statistics(name, model, target, x), **METHODS[name].small)
    move(adapter)
    run(adapted, x).sum().backward()
    with adapter.disabled():
        assert torch.equal(run(adapted, x), y)
    adapter.detach()
    assert _picture(model) == picture
    assert torch.equal(run(model, x), y)


def _picture(model):
    """Everything of a model that a stranger could see: classes, attributes, flags, bits."""
    return [
        (path, type(m), sorted(m.__dict__), sorted(m._modules), id(m.__dict__.get("config")), m.training, [
            (n, id(p), p.requires_grad, p.detach().numpy().tobytes()) for n, p in m.named_parameters(recurse=False)
        ])
        for path, m in model.named_modules()
    ]  # fmt: skip


@each_case
def test_copies_and_pickles_are_independent_and_equal(name, host):
    _, model, target, x = hosts()[host]
    adapted, adapter = adapt(name, model, target, x)
    y = run(adapted, x)
    twins = [copy.deepcopy(adapted), pickle.loads(pickle.dumps(adapted))]
    stream = io.BytesIO()
    torch.save(adapted, stream)
    stream.seek(0)
    twins.append(torch.load(stream, weights_only=False))
    move(adapter, 1.0, seed=2)
    assert not torch.equal(run(adapted, x), y)
    for twin in twins:
        assert torch.equal(run(twin, x), y)
        graft.adapters(twin)["default"].detach()
        assert torch.equal(run(twin, x), run(model.eval(), x))


@each_case
def test_saved_and_loaded_is_bit_identical(name, host, tmp_path):
    _, model, target, x = hosts()[host]
    adapted, adapter = adapt(name, model, target, x)
    adapter.save(tmp_path / "adapter")
    again = copy.deepcopy(model).eval()
    random = torch.get_rng_state()
    loaded = graft.load(again, tmp_path / "adapter", trainable=True)  # torch folds products by this flag
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(run(again, x), run(adapted, x))
    assert loaded.recipe.hyper == adapter.recipe.hyper
    loaded.detach()
    assert torch.equal(run(again, x), run(model.eval(), x))


@each_first
def test_compiles_to_one_graph_once(name):
    _, model, target, x = hosts(torch.float32)[FITS[name][0]]
    adapted, adapter = adapt(name, model, target, x)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(adapted, fullgraph=True, backend=counter)
    for step in range(3):
        run(compiled, x).sum().backward()
        adapter.step(step / 2)
        move(adapter, 0.1, seed=step)
    torch.testing.assert_close(run(compiled, x), run(adapted, x), rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", [n for n in NAMES if "linear" in METHODS[n].hosts and n != "full"])
def test_no_full_size_matrix_is_kept_for_backward(name):
    if METHODS[name].forward is Delta.forward and METHODS[name].act is Delta.act:
        pytest.skip("has no activation path: W' is a function of W")
    model = Model(nn.Linear(BIG, BIG + 32))
    x = torch.randn(2, 3, BIG, requires_grad=True)
    small = {k: v for k, v in METHODS[name].small.items() if k != "block"}
    adapted, _ = adapt(name, model, "host", x, **small)
    own = {t.untyped_storage().data_ptr() for t in (*adapted.parameters(), *adapted.buffers())}
    kept = []

    def pack(t):
        if t.numel() >= model.host.weight.numel() and t.untyped_storage().data_ptr() not in own:
            kept.append(tuple(t.shape))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        adapted(x)
    assert not kept, f"{name} keeps {kept}"


@each_case
def test_half_precision_base_keeps_float32_adapter(name, host):
    _, model, target, x = hosts(torch.bfloat16)[host]
    adapted, adapter = adapt(name, model, target, x, jitter=0.05)
    assert {p.dtype for p in adapter.parameters()} <= {torch.float32}
    y = run(adapted, x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for _, p in _parameters(adapter))


@each_case
def test_autocast(name, host):
    _, model, target, x = hosts(torch.float32)[host]
    adapted, _ = adapt(name, model, target, x, jitter=0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, base = run(adapted, x), run(model.eval(), x)
    assert y.dtype == base.dtype
    y.float().square().sum().backward()
    torch.testing.assert_close(y.float(), run(adapted, x), rtol=0.1, atol=0.1)


@each_case
@pytest.mark.parametrize("outside", [False, True])
def test_stacks_with_another_method(name, host, outside):
    _, model, target, x = hosts()[host]
    other, other_target = ("lora", target)
    if not set(METHODS["lora"].hosts) & {hosts()[host][0]}:
        other, other_target = ("lora", r".*q_proj") if host in ("attention", "model") else ("full", target)
    order = [(name, target), (other, other_target)]
    adapted = copy.deepcopy(model).eval()
    stats, made = statistics(name, model, target, x), {}
    for n, t in order if outside else reversed(order):
        made[n if n not in made else "again"] = graft.attach(
            adapted, n, t, name=f"a{len(made)}", stats=stats if n == name else None, **METHODS[n].small
        )
    for i, adapter in enumerate(made.values()):
        move(adapter, seed=i)
    y = run(adapted, x)
    hosting = next(iter(next(iter(made.values())).deltas.values())).site
    deltas = [d for a in made.values() for d in a.deltas.values()]
    if all(d.mergeable() for d in deltas) and len(deltas) == 2 and hosting.kind != "module":
        chain = hosting.module.chain
        torch.testing.assert_close(y, hosting.apply(x, chain.weight, chain.bias))
    first, second = made.values()
    with second.disabled():
        alone = run(adapted, x)
    assert not torch.equal(alone, y)
    first.detach()
    second.detach()
    assert torch.equal(run(adapted, x), run(model.eval(), x))


@each_case
def test_gradient_checkpointing(name, host):
    _, model, target, x = hosts()[host]
    adapted, adapter = adapt(name, model, target, x)
    plain = torch.autograd.grad(run(adapted, x).sin().sum(), adapter.parameters(), allow_unused=True)
    again = torch.autograd.grad(
        checkpoint(lambda v: run(adapted, v), x, use_reentrant=False).sin().sum(),
        adapter.parameters(),
        allow_unused=True,
    )
    for a, b in zip(plain, again):
        assert (a is None) == (b is None) and (a is None or torch.equal(a, b))


@each_case
def test_what_is_kept_in_inference_follows_every_change(name, host, monkeypatch):
    """A copy never carries what was kept, so that it computes everything anew."""
    _, model, target, x = hosts()[host]
    adapted, adapter = adapt(name, model, target, x)
    adapter.requires_grad_(False)
    delta = list(adapter.deltas.values())[-1]
    owners = [*delta.modules(), *([] if delta.shared is None else delta.shared.modules())]
    tensors = [t for m in owners for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]
    tensors += base_parameters(base_modules(delta.site.module)).values()
    floating = [t for t in tensors if t.is_floating_point()]
    made = []
    for cls in {type(d) for d in adapter.deltas.values()}:
        prepare = cls.prepare
        monkeypatch.setattr(cls, "prepare", lambda self, inner, do=prepare: made.append(0) or do(self, inner))
    with torch.no_grad():
        assert torch.equal(run(adapted, x), run(copy.deepcopy(adapted), x))
        made.clear()
        run(adapted, x)
        assert not made, "what weights alone decide was computed again"
        for t in floating:
            with torch.inference_mode(t is floating[0]):
                t.mul_(1.1).add_(0.01)
            assert torch.equal(run(adapted, x), run(copy.deepcopy(adapted), x))
        for t in floating:
            t.data = t * 1.1 + 0.01
            assert torch.equal(run(adapted, x), run(copy.deepcopy(adapted), x))
        for m in owners:
            for key, p in m._parameters.items():
                if p is not None:
                    setattr(m, key, nn.Parameter(p * 1.1 + 0.01, requires_grad=False))
                    assert torch.equal(run(adapted, x), run(copy.deepcopy(adapted), x))
        adapted.to(torch.float32)
        x = x.float() if x.is_floating_point() else x
        assert torch.equal(run(adapted, x), run(copy.deepcopy(adapted), x))


@each_case
def test_declares_whether_it_passes_x(name, host):
    _, model, target, x = hosts()[host]
    adapted, adapter = adapt(name, model, target, x)
    delta = list(adapter.deltas.values())[-1]
    link = delta.site.module.chain if delta.place == "forward" else delta.site.module.product
    link.inner = seen = Seen(link.inner)
    given = []
    delta.register_forward_pre_hook(lambda _, args, kwargs: given.append((args[1:], kwargs)), with_kwargs=True)
    run(adapted, x)
    flat = [[*args, *kwargs.values()] for args, kwargs in (*given, *seen.calls)]
    passed = len(flat) == 2 and len(flat[0]) == len(flat[1]) and all(a is b for a, b in zip(*flat))
    assert passed == delta.passes_x
    assert passed or not delta.by_factors, "rows by factors are added to one call of the base"


class Seen:
    """The inner function, which notes how it is called."""

    def __init__(self, inner):
        self.inner, self.calls = inner, []

    def __call__(self, *args, **kwargs):
        self.calls.append((args, kwargs))
        return self.inner(*args, **kwargs)

    def __getattr__(self, name):
        return getattr(self.inner, name)


FACTORED = [n for n in NAMES if METHODS[n].factors is not Delta.factors]


@pytest.mark.parametrize("name, host", [(n, h) for n, h in WITH_WEIGHT if n in FACTORED])
def test_factors_are_the_change_of_the_weight(name, host):
    _, model, target, x = hosts()[host]
    _, adapter = adapt(name, model, target, x, **({"rank": 1} if name == "loha" else {}))
    delta = next(iter(adapter.deltas.values()))
    A, B = delta.factors()
    w = delta.site.weight
    torch.testing.assert_close(w + B @ A, delta.weight(w))
    assert A.shape == (B.shape[1], w.shape[1]) and B.shape[0] == w.shape[0]
    probe = torch.randn_like(w)
    own = [p for p in adapter.parameters() if p.requires_grad]
    ours = torch.autograd.grad((probe * (B @ A)).sin().sum(), own)
    for a, r in zip(ours, torch.autograd.grad((probe * (delta.weight(w) - w)).sin().sum(), own)):
        torch.testing.assert_close(a, r)


@each_case
def test_rows_of_one_batch_use_different_deltas(name, host):
    _, model, target, x = hosts()[host]
    model = copy.deepcopy(model).eval()
    cls, stats = METHODS[name], statistics(name, model, target, x)
    for seed in range(3):
        move(graft.attach(model, name, target, name=f"a{seed}", seed=seed, stats=stats, **cls.small), seed=seed)
    rows = ["a2", None, "a0"]
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients), graft.route(model, rows):
            together = run(model, x)
            twice = run(model, x.repeat_interleave(2, 0))[::2]
        for i, row in enumerate(rows):
            graft.activate(model, *([row] if row else []))
            torch.testing.assert_close(together[i], run(model, x[i : i + 1])[0])
            torch.testing.assert_close(twice[i], together[i])


@each_first
def test_bad_hyperparameters_are_refused(name):
    cls = METHODS[name]
    with pytest.raises(graft.GraftError, match="no hyperparameter 'nonsense'"):
        cls(**cls.small, nonsense=1)
    for key, hyper in hyperparameters(cls).items():
        assert hyper.kinds, f"{name}: {key} has no type"
        assert hyper.doc, f"{name}: {key} is not explained"
        bad = [r.low - 1 for r in hyper.ranges if r.low > -1e300] + [r.above for r in hyper.ranges if r.above > -1e300]
        for value in [*bad, object()]:
            value = (
                int(value) if int in hyper.kinds and not isinstance(value, object.__class__) and value in bad else value
            )
            with pytest.raises(graft.GraftError, match=key):
                cls(**(cls.small | {key: value}))


@each_first
def test_is_documented(name):
    cls = METHODS[name]
    doc = inspect.cleandoc(cls.__doc__ or "")
    assert "=" in doc and "[" in doc, f"{name}: the docstring needs the formula and the shapes"
    assert cls.papers or name == "full"
    for paper in cls.papers:
        assert paper.title and paper.authors and 1980 < paper.year < 2100 and paper.url.startswith("https://")


@each_first
def test_says_where_it_is_known_to_shine_or_fail(name):
    known = vars(METHODS[name]).get("known", "")  # what is true of a class above is not true of this one
    sentences = re.split(r"(?<=\.)\s+(?=\S)", known)
    assert known.endswith(".") and 1 <= len(sentences) <= 2 and "\n" not in known, known
    assert re.search("author|documentation|measured", known), f"{name}: who says so?"


@each_first
def test_does_not_change_the_base(name):
    _, model, target, x = hosts()[FITS[name][0]]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    adapted, adapter = adapt(name, model, target, x)
    optimizer = torch.optim.SGD([p for _, p in _parameters(adapter)], 0.1)
    run(adapted, x).sin().sum().backward()
    optimizer.step()
    now = adapted.state_dict()
    assert all(torch.equal(now[k], v) for k, v in before.items())


def test_no_warning_on_import():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        methods.load()
