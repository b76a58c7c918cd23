"""What is kept in inference: when it is made anew, when it is not kept at all, and that it goes nowhere else."""

import copy
import gc
import io
import pickle
import threading
import weakref

import pytest
import torch
from torch import nn

import graft
from graft import methods
from graft.core.delta import Delta
from graft.core.host import mount
from graft.core.kept import FREE
from graft.core.site import site_for
from models import llama, move, tokens

methods.load()


def model(width=8, dtype=torch.float64, bias=True):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, width, bias=bias, dtype=dtype)).eval()


def frozen(base, method, *args, **kw):
    adapter = move(graft.attach(base, method, *args, **kw)).requires_grad_(False)
    return adapter, next(iter(adapter.deltas.values()))


@pytest.fixture
def count(monkeypatch):
    """How often each method prepared."""
    made = {}

    def counted(name):
        cls = graft.METHODS[name]
        prepare = cls.prepare

        def prepare_and_count(self, inner):
            made[name] = made.get(name, 0) + 1
            return prepare(self, inner)

        monkeypatch.setattr(cls, "prepare", prepare_and_count)

    for name in ("lora", "dora", "llama_adapter"):
        counted(name)
    return made


def fresh(base, *args):
    return copy.deepcopy(base)(*args)


@torch.no_grad()
def test_the_delta_inside_is_followed(count):
    base, x = model(), torch.randn(3, 8, dtype=torch.float64)
    inside, low = frozen(base, "lora", name="inside", rank=2)
    _, outside = frozen(base, "dora", name="outside", rank=2)
    for change in (
        lambda: low.B.mul_(2),
        inside.disable,
        inside.enable,
        lambda: setattr(low, "scaling", 0.5),
        lambda: setattr(low, "A", nn.Parameter(low.A * 3, requires_grad=False)),
        lambda: setattr(outside.low, "scaling", 0.25),
        lambda: graft.activate(base, "outside", "inside"),
        inside.detach,
    ):
        base(x)
        count.clear()
        change()
        torch.testing.assert_close(base(x), fresh(base, x), rtol=0, atol=0)
        assert count["dora"] == 2, "once here and once in the copy"


@torch.no_grad()
def test_switching_makes_nothing_anew(count):
    base, x = model(), torch.randn(3, 8, dtype=torch.float64)
    for name in "ab":
        frozen(base, "dora", name=name, rank=2)
    expect = {}
    for round in range(3):
        for name in "ab":
            graft.activate(base, name)
            expect.setdefault(name, base(x))
            assert torch.equal(base(x), expect[name])
        assert count["dora"] == 2, f"round {round}"


@torch.no_grad()
def test_a_trained_delta_inside_matters_only_to_those_who_look_at_it(count):
    base, x = model(), torch.randn(3, 8, dtype=torch.float64)
    trained = graft.attach(base, "lora", name="trained", rank=2)
    _, lora = frozen(base, "lora", name="lora", rank=2)
    _, dora = frozen(base, "dora", name="dora", rank=2)
    base(x)
    assert lora._kept and not dora._kept
    trained.parameters()[1].data.fill_(1.0)  # not counted by torch
    assert torch.equal(base(x), fresh(base, x))


@torch.no_grad()
def test_nothing_is_kept_while_a_tensor_may_be_trained():
    base, x = model(), torch.randn(3, 8, dtype=torch.float64)
    adapter, delta = frozen(base, "lora", rank=2)
    base(x)
    assert delta._kept
    adapter.requires_grad_(True)
    delta.B.data.mul_(2)  # not counted by torch
    assert torch.equal(base(x), fresh(base, x))
    assert not delta._kept
    adapter.requires_grad_(False)
    base(x)
    assert delta._kept
    with torch.enable_grad():
        base(x)
    assert not delta._kept


@pytest.mark.parametrize("moved", [False, True])
@torch.inference_mode()
def test_tensors_without_a_counter_are_not_kept(moved):
    with torch.inference_mode(not moved):
        base, x = model(), torch.randn(3, 8, dtype=torch.float32)
        _, delta = frozen(base, "lora", rank=2)
    base.float()
    base(x)
    assert delta.B.is_inference() and not delta._kept
    delta.B.mul_(2)
    assert torch.equal(base(x), fresh(base, x))


@torch.no_grad()
def test_nothing_of_the_size_of_the_matrix_is_kept():
    class Whole(Delta):
        """W' = 2 W."""

        def weight(self, w):
            return 2 * w

    width = int((FREE / 4) ** 0.5)
    for size, kept in ((width // 2, True), (width, False)):
        base = model(size, torch.float32, bias=False).requires_grad_(False)
        site = site_for("0", base[0], ("linear",))
        mount("whole", delta := Whole(site))
        base[0].relink(["whole"])
        x = torch.randn(3, size)
        torch.testing.assert_close(base(x), 2 * x @ base[0].weight.T)
        assert bool(delta._kept) == kept


@torch.no_grad()
def test_shared_tensors_are_not_copied_for_each_site():
    base = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3)))
    adapter = move(graft.attach(base, "vera", r"\d", rank=4)).requires_grad_(False)
    base(torch.randn(2, 16))
    shared = {t.untyped_storage().data_ptr() for t in adapter.shared.buffers()}
    for delta in adapter.deltas.values():
        own = [t for t in delta._kept.made if t.untyped_storage().data_ptr() not in shared]
        assert sum(t.numel() for t in own) == 4 + 16


@torch.no_grad()
def test_it_stays_out_of_copies_and_files(tmp_path):
    base, x = model(), torch.randn(3, 8, dtype=torch.float64)
    adapter, delta = frozen(base, "dora", rank=2)
    before = pickle.dumps(base)
    state = set(base.state_dict())
    base(x)
    assert delta._kept and pickle.dumps(base) == before and set(base.state_dict()) == state
    stream = io.BytesIO()
    torch.save(base, stream)
    stream.seek(0)
    for twin in (copy.deepcopy(base), pickle.loads(before), torch.load(stream, weights_only=False)):
        assert not twin[0].deltas["default"]._kept
        assert torch.equal(twin(x), base(x))
    adapter.detach()
    assert torch.equal(base(x), nn.functional.linear(x, base[0].weight, base[0].bias))


@torch.no_grad()
def test_what_was_detached_is_freed():
    base, x = model(), torch.randn(3, 8, dtype=torch.float64)
    inside, low = frozen(base, "lora", name="inside", rank=2)
    _, outside = frozen(base, "dora", name="outside", rank=2)
    base(x)
    outside_kept = outside._kept
    gone = weakref.ref(low)
    inside.detach()
    del inside, low
    gc.collect()
    assert outside_kept and gone() is None


@torch.no_grad()
def test_autocast_is_not_kept():
    base, x = model(dtype=torch.float32), torch.randn(3, 8)
    frozen(base, "dora", rank=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        base(x)
    assert torch.equal(base(x), fresh(base, x))


@torch.no_grad()
def test_a_tensor_in_the_place_of_another_is_seen():
    base, x = model(), torch.randn(3, 8, dtype=torch.float64)
    _, delta = frozen(base, "lora", rank=8)
    delta.B = nn.Parameter(delta.B.data, requires_grad=False)
    first, before = base(x), (delta.B._version, delta.B.data_ptr())
    delta.B = nn.Parameter(delta.B.data.T, requires_grad=False)
    assert before == (delta.B._version, delta.B.data_ptr())
    assert not torch.allclose(base(x), first) and torch.equal(base(x), fresh(base, x))


@pytest.mark.parametrize("cast", [False, True])
@torch.no_grad()
def test_a_change_of_precision_is_followed(cast, monkeypatch):
    if cast:  # as on an accelerator
        monkeypatch.setattr(Delta, "_casts", lambda self, t, dtype: True)
    base, x = model(dtype=torch.bfloat16), torch.randn(3, 8)
    frozen(base, "lora", rank=2)
    base(x.bfloat16())
    base.float()
    assert torch.equal(base(x), fresh(base, x))


def test_compiled_graphs_keep_nothing():
    base, x = model(dtype=torch.float32), torch.randn(3, 8)
    _, delta = frozen(base, "dora", rank=2)
    torch._dynamo.reset()
    compiled = torch.compile(base, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        compiled(x)
        assert not delta._kept
        delta.m.mul_(2)
        torch.testing.assert_close(compiled(x), fresh(base, x))


@torch.no_grad()
def test_rows_of_a_route_have_their_own():
    base, x = model(), torch.randn(3, 5, 8, dtype=torch.float64)
    for i, name in enumerate("abc"):
        move(frozen(base, "dora", name=name, rank=2, seed=i)[0], seed=i)
    for _ in range(2):
        with graft.route(base, list("cab")):
            together = base(x)
        for i, name in enumerate("cab"):
            graft.activate(base, name)
            torch.testing.assert_close(base(x[i]), together[i])
            graft.adapters(base)[name].parameters()[0].mul_(1.5)


def test_keys_of_a_prompt_follow_the_projections(count):
    base, ids = llama(), tokens()
    _, delta = frozen(base, "llama_adapter", name="prompt", length=3)
    lora, _ = frozen(base, "lora", r".*\.k_proj", name="lora", rank=2)
    first = base.model.layers[0].self_attn
    for change in (
        lambda: None,
        lora.disable,
        lora.enable,
        lambda: first.v_proj.weight.mul_(2),
        lambda: lora.deltas["model.layers.0.self_attn.k_proj"].A.mul_(2),
        lambda: setattr(lora.deltas["model.layers.0.self_attn.k_proj"], "scaling", 0.1),
    ):
        with torch.no_grad():
            change()
            logits = base(ids).logits
            assert torch.equal(logits, fresh(base, ids).logits)
            count.clear()
            assert torch.equal(base(ids).logits, logits) and not count
    assert delta._kept


def test_threads_do_not_disturb_each_other():
    base, x = model(), torch.randn(3, 8, dtype=torch.float64)
    frozen(base, "dora", rank=2)
    with torch.no_grad():
        expect = base(x)
    wrong = []

    def work(grad):
        with torch.set_grad_enabled(grad):
            wrong.extend(i for i in range(100) if not torch.allclose(base(x), expect))

    threads = [threading.Thread(target=work, args=(i % 2 == 0,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong
