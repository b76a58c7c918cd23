"""A saved adapter: complete or not there, loaded bit for bit on its own base, refused with one sentence otherwise."""

import json
import os
import pickle
import shutil
import struct
import sys
import types
import warnings
import zlib

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import graft
from graft import Delta, GraftError
from graft.core import files
from graft.core.delta import METHODS
from graft.core.fingerprint import _step
from models import damage

TENSORS, CONFIG, CARD = "adapter_model.safetensors", "adapter_config.json", "README.md"


class Block(nn.Module):
    def __init__(self, d=6):
        super().__init__()
        self.proj, self.norm = nn.Linear(d, d), nn.LayerNorm(d)

    def forward(self, x):
        return x + self.proj(self.norm(x))


class Net(nn.Module):
    """proj, inner.proj and inner.inner.proj: paths that end alike."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(10, 6)
        self.proj = nn.Linear(6, 6)
        self.inner = Block()
        self.inner.inner = Block()
        self.classifier = nn.Linear(6, 3)

    def forward(self, x):
        return self.classifier(self.inner.inner(self.inner(self.proj(self.tokens(x)))))


X = torch.tensor([[1, 2, 3], [9, 8, 0]])


def net(seed=0, head=0):
    torch.manual_seed(seed)
    model = Net().eval()
    torch.manual_seed(head)
    nn.init.normal_(model.classifier.weight)
    return model


def trained(model, recipe=None, **options):
    options = {"targets": ".*proj", "heads": ["classifier"], "seed": 3} | options
    adapter = graft.attach(model, recipe or graft.LoRA(rank=2, alpha=3.0), **options)
    torch.manual_seed(5)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return adapter


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters") / "good"
    trained(net()).save(folder)
    return folder


@pytest.fixture
def copied(good, tmp_path):
    shutil.copytree(good, tmp_path / "copy")
    return tmp_path / "copy"


def expected():
    model = net()
    trained(model)
    return model(X)


def trace(model):
    """All that loading could touch: values, classes, attributes, flags."""
    return {
        name: (type(m), sorted(vars(m)), m.training, [(k, p.requires_grad, p) for k, p in m._parameters.items()])
        for name, m in model.named_modules()
    }, {k: v.clone() for k, v in model.state_dict().items()}


def untouched(model, before):
    (shape, values), (old_shape, old_values) = trace(model), before
    same = shape.keys() == old_shape.keys() and values.keys() == old_values.keys()
    return (
        same
        and all(torch.equal(values[k], old_values[k]) for k in values)
        and all(shape[k][:3] == old_shape[k][:3] for k in shape)
        and all(
            a[:2] == b[:2] and a[2] is b[2] for k in shape for a, b in zip(shape[k][3], old_shape[k][3], strict=True)
        )
    )


def refuses(folder, words="", model=None, **options):
    model = model or net()
    before = trace(model)
    with pytest.raises(GraftError, match=words or None) as caught:
        graft.load(model, folder, **options)
    assert untouched(model, before)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit(folder, change, seal=True):
    """Change the configuration; `seal` makes its checksum fit again."""
    config = json.loads((folder / CONFIG).read_text())
    change(config)
    if seal:
        config["checksum"] = files.checksum(config)
    (folder / CONFIG).write_text(json.dumps(config))


def replace_tensors(folder, change):
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file({k: v.clone() for k, v in tensors.items()}, folder / TENSORS)
    digest = zlib.crc32((folder / TENSORS).read_bytes())
    edit(folder, lambda c: c.update(tensors_crc32=digest))


# There and back


@pytest.mark.parametrize("dtype", [None, torch.float64, torch.bfloat16])
def test_loaded_is_bit_identical(tmp_path, dtype):
    model = net(head=1)
    adapter = trained(model, dtype=dtype)
    adapter.save(tmp_path / "a")
    other = net(head=2)  # a new classifier is random at every load
    before = trace(other)
    again = graft.load(other, tmp_path / "a")
    if dtype is None:
        assert torch.equal(other(X), model(X))
    assert {k: v.dtype for k, v in again.state_dict().items()} == {k: v.dtype for k, v in adapter.state_dict().items()}
    assert all(torch.equal(v, adapter.state_dict()[k]) for k, v in again.state_dict().items())
    assert (again.targets, again.seed, again.name) == (".*proj", 3, "default")
    assert [p for p, _ in again.heads] == ["classifier"]
    again.detach()
    assert untouched(other, before) and torch.equal(other(X), net(head=2)(X))


def test_hyperparameters_by_site_are_kept_by_path(tmp_path):
    # paths end alike: a table by pattern would give "proj" and "inner.proj" one value
    ranks = {"proj": 1, "inner.proj": 2, "inner.inner.proj": 3}
    model = net()
    adapter = trained(model, graft.LoRA(rank=lambda site: ranks[site.path], alpha={"inner.proj": 5.0, "proj": 7.0}))
    adapter.save(tmp_path / "a")
    config = json.loads((tmp_path / "a" / CONFIG).read_text())
    assert config["hyperparameters"]["rank"] == ranks
    assert config["hyperparameters"]["alpha"] == {"proj": 7.0, "inner.proj": 5.0, "inner.inner.proj": 5.0}
    other = net()
    again = graft.load(other, tmp_path / "a", name="again")
    assert {p: len(d.A) for p, d in again.deltas.items() if p in ranks} == ranks
    assert torch.equal(other(X), model(X))
    again.save(tmp_path / "b")
    assert json.loads((tmp_path / "b" / CONFIG).read_text())["hyperparameters"] == config["hyperparameters"]


def test_targets_given_as_a_function_are_saved_as_paths(tmp_path):
    model = net()
    trained(model, targets=lambda path, module: path in ("proj", "inner.proj")).save(tmp_path / "a")
    again = graft.load(net(), tmp_path / "a")
    assert again.targets == ["proj", "inner.proj"] and "inner.inner.proj" not in again.deltas


def test_frozen_unless_trainable(good):
    assert not any(p.requires_grad for p in graft.load(net(), good).parameters())
    assert all(p.requires_grad for p in graft.load(net(), good, trainable=True).parameters())


def test_beside_another_adapter(good):
    model = net()
    trained(model, name="first", targets="proj", heads=())
    refuses(good, "letters", name="bad name!")
    graft.load(model, good, name="second")
    assert list(graft.adapters(model)) == ["first", "second"]
    with pytest.raises(GraftError, match="second"):
        graft.load(model, good, name="second")
    assert list(graft.adapters(model)) == ["first", "second"]


def test_a_delta_from_a_file_needs_no_statistics(tmp_path):
    class Measured(Delta, name="measured"):
        """y + s n with n [out] found from data; its number k of rows is told by nothing but the data."""

        needs = ("input_gram",)

        def __init__(self, site):
            super().__init__(site)
            rows = torch.zeros_like(site.saved["rows"]) if site.saved else site.stats["input_gram"][:2].clone()
            self.rows = nn.Parameter(rows)

        def weight(self, w):
            return w + self.rows.sum(0)

    try:
        model = net()
        with pytest.raises(GraftError, match="input_gram"):
            graft.attach(model, "measured", "^proj")
        stats = {"proj": {"input_gram": torch.randn(6, 6)}}
        graft.attach(model, "measured", "^proj", stats=stats).save(tmp_path / "a")
        other = net()
        adapter = graft.load(other, tmp_path / "a")
        assert torch.equal(other(X), model(X)) and adapter.deltas["proj"].site.saved is None
    finally:
        del METHODS["measured"]


class Noisy(Delta):
    """y + rows + noise: its start is random, and `noise` is not in the file where `kept` is false."""

    def __init__(self, site, *, kept: bool = False):
        super().__init__(site)
        self.rows = nn.Parameter(0.1 * torch.randn(site.d_out))
        self.register_buffer("noise", nn.init.normal_(torch.empty(site.d_out)), persistent=kept)
        self.start = self.rows.detach().clone()

    def weight(self, w):
        return w + (self.rows + self.noise)[:, None]


@pytest.mark.parametrize("kept", [False, True])
def test_random_numbers_are_drawn_again_only_where_the_file_lacks_them(tmp_path, monkeypatch, kept):
    monkeypatch.setattr(Noisy, "name", "noisy")
    monkeypatch.setitem(METHODS, "noisy", Noisy)
    model = net()
    trained(model, Noisy(kept=kept)).save(tmp_path / "a")
    other = net()
    again = graft.load(other, tmp_path / "a")
    assert torch.equal(other(X), model(X))
    starts = [again.deltas[path].start for path in ("proj", "inner.proj", "inner.inner.proj")]
    assert all(bool(s.any()) != kept for s in starts)


# The folder


def test_the_folder_holds_three_files_and_says_all(good):
    assert sorted(os.listdir(good)) == [CARD, CONFIG, TENSORS]
    config = json.loads((good / CONFIG).read_text())
    assert (
        config["method"] == "lora" and config["base_class"] == "Net" and config["library_version"] == graft.__version__
    )
    expected = {"rank": 2, "alpha": 3.0, "dropout": 0.0, "rslora": False, "bias": False, "init": "random"}
    expected |= {"tucker": False}
    assert config["hyperparameters"] == expected
    assert config["base_fingerprint"] == graft.fingerprint(net(), ["classifier"])
    (good.parent / "plain").mkdir(exist_ok=True)
    assert good.stat().st_mode == (good.parent / "plain").stat().st_mode


def test_the_model_card_has_a_front_matter_and_loads_in_python(tmp_path):
    yaml = pytest.importorskip("yaml")
    trained(net()).save(tmp_path / "mine", base_model="some-org/some-net")
    card = (tmp_path / "mine" / CARD).read_text()
    _, front, body = card.split("---\n", 2)
    front = yaml.safe_load(front)
    assert front["library_name"] == "graft" and front["base_model"] == "some-org/some-net" and "lora" in front["tags"]
    assert "# mine" in body and "https://arxiv.org/abs/2106.09685" in body and "| rank | `2` |" in body
    code = body.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert "graft.load(model, 'mine')" in code


def test_a_path_on_this_machine_is_no_base_for_the_card(tmp_path):
    trained(net()).save(tmp_path / "a", base_model=str(tmp_path))
    assert str(tmp_path) not in (tmp_path / "a" / CARD).read_text()


def test_an_adapter_is_replaced_only_when_asked(tmp_path):
    adapter = trained(net())
    adapter.save(tmp_path / "a")
    first = (tmp_path / "a" / TENSORS).read_bytes()
    with torch.no_grad():
        adapter.parameters()[0].add_(1)
    with pytest.raises(GraftError, match="overwrite=True"):
        adapter.save(tmp_path / "a")
    assert (tmp_path / "a" / TENSORS).read_bytes() == first
    adapter.save(tmp_path / "a", overwrite=True)
    assert (tmp_path / "a" / TENSORS).read_bytes() != first
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("content", ["notes.txt", CARD, "adapter_config.json/x", "file"])
def test_what_is_no_adapter_is_never_overwritten(tmp_path, content):
    place = tmp_path / "mine"
    if content == "file":
        place.write_text("precious")
    else:
        (place / content).parent.mkdir(parents=True)
        (place / content).write_text("precious")
        if content == "notes.txt":
            trained(net()).save(tmp_path / "a")
            for name in (CONFIG, TENSORS):
                shutil.copy(tmp_path / "a" / name, place)
    before = sorted(p for p in tmp_path.rglob("*"))
    with pytest.raises(GraftError):
        trained(net()).save(place, overwrite=True)
    assert sorted(p for p in tmp_path.rglob("*") if "/a" not in str(p)) == [p for p in before if "/a" not in str(p)]


def test_an_empty_folder_is_filled(tmp_path):
    trained(net()).save(tmp_path)
    graft.load(net(), tmp_path)


@pytest.mark.parametrize("call", ["write", "fsync", "mkdir", "rename", "second rename"])
@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_save_leaves_the_old_folder_or_none(tmp_path, monkeypatch, call, there, error):
    adapter = trained(net())
    if there:
        adapter.save(tmp_path / "a")
    elif call == "second rename":
        return
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    real, left = os.rename, [2 if call == "second rename" else 1]

    def fail(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            raise error
        return real(*args)

    if call == "write":
        monkeypatch.setattr("builtins.open", lambda *a, **k: fail())
    elif call == "mkdir":
        monkeypatch.setattr("pathlib.Path.mkdir", fail)
    else:
        monkeypatch.setattr(os, "fsync" if call == "fsync" else "rename", fail)
    with pytest.raises(GraftError if isinstance(error, OSError) else KeyboardInterrupt):
        adapter.save(tmp_path / "a", overwrite=True)
    monkeypatch.undo()
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_nan_is_not_saved(tmp_path):
    adapter = trained(net())
    with torch.no_grad():
        adapter.parameters()[0][0, 0] = float("nan")
    with pytest.raises(GraftError, match="NaN"):
        adapter.save(tmp_path / "a")
    assert not os.listdir(tmp_path)


# The base


def test_another_base_is_refused_unless_asked_for(good):
    message = refuses(good, "allow_other_base=True", net(seed=1))
    assert "Net" in message
    graft.load(net(seed=1), good, allow_other_base=True)


def test_another_shape_is_refused_in_any_case(good):
    model = net()
    model.inner.proj = nn.Linear(6, 7)
    refuses(good, "inner.proj", model, allow_other_base=True)
    model = net()
    del model.inner.inner
    refuses(good, "inner.inner.proj", model, allow_other_base=True)


def test_the_fingerprint_tells_the_base_and_nothing_else():
    own = graft.fingerprint(net())
    assert own == graft.fingerprint(net()) == graft.fingerprint(net().bfloat16()) == graft.fingerprint(net().double())
    assert own != graft.fingerprint(net(seed=1)) != graft.fingerprint(net(head=1))
    assert graft.fingerprint(net(), ["classifier"]) == graft.fingerprint(net(head=1), ["classifier"])
    model = net()
    adapter = trained(model)
    assert graft.fingerprint(model) == own
    with graft.merge(model):
        assert graft.fingerprint(model) != own
    assert graft.fingerprint(model) == own
    adapter.detach()
    assert graft.fingerprint(model) == own


@given(
    shape=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    where=st.integers(0, 10**6),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_small_tensors_are_compared_whole(shape, where, dtype):
    a = nn.ParameterDict({"w": torch.ones(shape, dtype=dtype)})
    b = nn.ParameterDict({"w": torch.ones(shape, dtype=dtype)})
    assert graft.fingerprint(a) == graft.fingerprint(b)
    if b["w"].numel() <= 1024:
        with torch.no_grad():
            b["w"].view(-1)[where % b["w"].numel()] = 2
        assert graft.fingerprint(a) != graft.fingerprint(b)
    assert graft.fingerprint(a) != graft.fingerprint(nn.ParameterDict({"w": torch.ones(*shape, 1, dtype=dtype)}))


def test_large_matrices_are_sampled_in_all_columns():
    a, b = nn.Linear(1024, 1024, bias=False), nn.Linear(1024, 1024, bias=False)
    with torch.no_grad():
        b.weight.copy_(a.weight)
        b.weight[:, 512:] += 1
    assert graft.fingerprint(a) != graft.fingerprint(b)


@given(rows=st.integers(1, 3000), columns=st.integers(2, 5000))
def test_samples_lie_in_all_parts_of_the_columns(rows, columns):
    step = _step(rows * columns, columns)
    places = torch.arange(0, rows * columns, step)
    assert len(places) == rows * columns if rows * columns <= 1024 else 256 / 3 < len(places) <= 256
    if len(places) >= 16:
        gaps = (places % columns).sort().values.diff(prepend=torch.tensor([0]), append=torch.tensor([columns]))
        assert gaps.max() <= max(1, 0.4 * columns)


def test_a_base_that_cannot_be_read_is_said(good, tmp_path):
    model = net()
    model.tokens = nn.Embedding(10, 6, device="meta")
    assert graft.fingerprint(model) is None
    with pytest.warns(UserWarning, match="not known"):
        graft.load(model, good)


# Damaged and hostile files


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_bytes_load_as_before_or_are_refused(good, tmp_path, data):
    folder = tmp_path / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(good, folder)
    file = folder / data.draw(st.sampled_from([TENSORS, CONFIG]))
    damage(file, data)
    model = net()
    before = trace(model)
    try:
        adapter = graft.load(model, folder)
    except GraftError as error:
        assert "\n" not in str(error)
    else:
        assert torch.equal(model(X), expected())
        adapter.detach()
    assert untouched(model, before)


def test_an_edited_configuration_is_noticed_and_can_be_meant(copied):
    edit(copied, lambda c: c["hyperparameters"].update(alpha=6.0), seal=False)
    refuses(copied, "checksum")
    edit(copied, lambda c: c.pop("checksum"), seal=False)
    model = net()
    assert graft.load(model, copied).recipe.hyper["alpha"] == 6.0


@st.composite
def junk(draw):
    return draw(
        st.one_of(st.none(), st.booleans(), st.integers(-3, 10**30), st.floats(allow_nan=False), st.text(max_size=8))
        | st.lists(st.text(max_size=4) | st.integers(), max_size=3)
        | st.dictionaries(st.text(max_size=4), st.integers() | st.text(max_size=3), max_size=2)
    )


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_configuration_of_any_content_is_refused_or_loads(good, tmp_path, data):
    folder = tmp_path / "strange"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(good, folder)

    def change(config):
        within = data.draw(st.sampled_from([config, config["hyperparameters"]]))
        key = data.draw(st.sampled_from(sorted(within)))
        if data.draw(st.booleans()):
            within[key] = data.draw(junk())
        else:
            del within[key]

    edit(folder, change)
    model = net()
    before = trace(model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapter = graft.load(model, folder)
    except GraftError:
        pass
    else:
        adapter.detach()
    assert untouched(model, before)


REFUSED = {
    "no format": (lambda c: c.pop("format"), "peft_type"),
    "a later format": (lambda c: c.update(format_version=99, library_version="9.1"), "upgrade graft.*9.1"),
    "a later version of the method": (lambda c: c.update(method_version=7, library_version="9.1"), "version 7.*9.1"),
    "unknown method": (lambda c: c.update(method="lara"), "did you mean lora"),
    "a hyperparameter of a later version": (
        lambda c: (c["hyperparameters"].update(wonder=1), c.update(library_version="9.1")),
        "wonder.*written by graft 9.1",
    ),
    "a lacking hyperparameter": (lambda c: c["hyperparameters"].pop("alpha"), "alpha"),
    "a bad hyperparameter": (lambda c: c["hyperparameters"].update(rank=-1), "rank must be"),
    "an absurd size": (lambda c: c["hyperparameters"].update(rank=10**9), "6,000,000,000"),
    "an impossible size": (lambda c: c["hyperparameters"].update(rank=10**30), "far more than"),
    "a table with a gap": (lambda c: c["hyperparameters"].update(rank={"proj": 2}), "inner.proj"),
    "an infinite number": (lambda c: c["hyperparameters"].update(alpha=float("inf")), "JSON"),
    "no modules": (lambda c: c.update(modules=[]), "modules"),
    "a module twice": (lambda c: c.update(modules=["proj", "proj"]), "once"),
    "a module of another base": (lambda c: c["modules"].append("layers.9.proj"), "layers.9.proj"),
    "a path that is none": (lambda c: c["modules"].append("../../etc/passwd"), "etc/passwd"),
    "a pattern for a path": (lambda c: c.update(modules=[".*"]), "no module"),
    "the model itself": (lambda c: c.update(modules=[""]), "the model"),
    "a module of the wrong kind": (lambda c: c["modules"].append("inner.norm"), "norm"),
    "a head that is a target": (lambda c: c.update(heads=["inner"]), "belongs to the head"),
    "a seed of too many bits": (lambda c: c.update(seed=2**70), "seed"),
    "an unknown dtype": (lambda c: c.update(dtype="float3"), "float3"),
}


@pytest.mark.parametrize("change, words", REFUSED.values(), ids=REFUSED)
def test_bad_configurations_are_refused_by_name(copied, change, words):
    edit(copied, change)
    refuses(copied, words)


def test_a_lacking_hyperparameter_of_an_older_version_takes_its_default(copied):
    edit(copied, lambda c: (c["hyperparameters"].pop("rslora"), c.update(library_version="0.0.1")))
    model = net()
    graft.load(model, copied)
    assert torch.equal(model(X), expected())


TENSOR_CHANGES = {
    "lacking": (lambda t: t.pop("proj:A"), "proj:A"),
    "extra": (lambda t: t.update({"proj:C": torch.ones(1)}), "proj:C"),
    "of no module": (lambda t: t.update({"x": torch.ones(1)}), "x"),
    "of another shape": (lambda t: t.update({"proj:A": torch.ones(2, 7)}), r"\(2, 7\)"),
    "of another type": (lambda t: t.update({"proj:A": torch.ones(2, 6, dtype=torch.int64)}), "int64"),
    "NaN": (lambda t: t["proj:A"].fill_(float("nan")), "proj:A holds NaN"),
    "infinite": (lambda t: t["classifier:copy.bias"].fill_(float("-inf")), "classifier:copy.bias holds NaN or inf"),
}


@pytest.mark.parametrize("change, words", TENSOR_CHANGES.values(), ids=TENSOR_CHANGES)
def test_bad_tensors_are_refused_by_name(copied, change, words):
    replace_tensors(copied, change)
    refuses(copied, words)


def test_a_header_that_claims_more_than_the_file_is_refused(copied):
    header = json.dumps({"proj:A": {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4 * 10**12]}}).encode()
    for content in (struct.pack("<Q", len(header)) + header, struct.pack("<Q", 2**60), b"", b"PK\x03\x04"):
        (copied / TENSORS).write_bytes(content)
        edit(copied, lambda c, content=content: c.update(tensors_crc32=zlib.crc32(content)))
        refuses(copied, "no sound safetensors file")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"\xff\xfe", b"[" * 10**5, b'{"seed": NaN}', b"1" * 5000])
def test_a_configuration_that_is_no_object_is_refused(copied, content):
    (copied / CONFIG).write_bytes(content)
    refuses(copied, CONFIG)


class Bomb:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (self.mark,)


def test_pickles_are_never_read(copied, tmp_path):
    (copied / TENSORS).unlink()
    (copied / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(str(tmp_path / "unpickled"))))
    refuses(copied, "adapter_model.bin is a pickle")
    shutil.copy(copied / "adapter_model.bin", copied / TENSORS)
    refuses(copied)
    assert not (tmp_path / "unpickled").exists()


@pytest.mark.parametrize("name", [TENSORS, CONFIG])
@pytest.mark.parametrize("kind", ["outside", "dangling", "folder", "loop"])
def test_links_out_of_the_folder_are_refused(copied, tmp_path, name, kind):
    (copied / name).rename(tmp_path / "elsewhere")
    if kind == "folder":
        (copied / name).mkdir()
    else:
        target = {"outside": tmp_path / "elsewhere", "dangling": tmp_path / "none", "loop": copied / name}[kind]
        (copied / name).symlink_to(target)
    refuses(copied, name)


def test_links_within_the_hub_s_cache_are_its_layout(good, tmp_path):
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "123", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True), blobs.mkdir()
    for i, name in enumerate((TENSORS, CONFIG)):
        shutil.copy(good / name, blobs / str(i))
        (snapshot / name).symlink_to(f"../../blobs/{i}")
    model = net()
    graft.load(model, snapshot)
    assert torch.equal(model(X), expected())


# The hub


def hub(monkeypatch, download):
    module = types.ModuleType("huggingface_hub")
    module.snapshot_download = download
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)


def test_an_id_is_looked_up_on_the_hub_without_pickles(good, monkeypatch):
    asked = []
    hub(monkeypatch, lambda repo, **options: asked.append((repo, options)) or str(good))
    model = net()
    graft.load(model, "some-org/some.adapter", revision="v2")
    assert torch.equal(model(X), expected())
    ((repo, options),) = asked
    patterns = options.pop("allow_patterns")
    assert (repo, options) == ("some-org/some.adapter", {"revision": "v2"})
    assert {"adapters.json", CONFIG, TENSORS} <= {*patterns}
    assert all(name.endswith((".json", ".safetensors")) and "*" not in name for name in patterns)


@pytest.mark.parametrize("place", ["nothing", "./a/b", "/a/b", "a/b/c", "../a", "a\\b", "", "org/name\n", "~/x"])
def test_what_is_no_id_is_not_looked_up(monkeypatch, tmp_path, place):
    monkeypatch.chdir(tmp_path)
    hub(monkeypatch, lambda *a, **k: pytest.fail("asked the hub"))
    refuses(place)


def test_what_the_hub_says_is_one_sentence(monkeypatch):
    def download(*args, **kwargs):
        raise ConnectionError("no route to host\nlong story")

    hub(monkeypatch, download)
    assert "no route to host" in refuses("some-org/adapter", "hub")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refuses("some-org/adapter", "install huggingface-hub")


def test_a_local_folder_goes_before_the_hub(good, monkeypatch, tmp_path):
    shutil.copytree(good, tmp_path / "org" / "name")
    monkeypatch.chdir(tmp_path)
    hub(monkeypatch, lambda *a, **k: pytest.fail("asked the hub"))
    graft.load(net(), "org/name")


def test_what_an_adapter_was_trained_for_comes_back(tmp_path):
    """Names of classes by number: JSON makes texts of such keys."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4))
    adapter = graft.attach(model, "lora", "0", rank=2)
    adapter.task = {"objective": "classification", "config": {"id2label": {i: f"class {i}" for i in range(12)}}}
    adapter.save(tmp_path / "a")
    adapter.detach()
    task = graft.load(model, tmp_path / "a").task
    assert task["config"]["id2label"] == {str(i): f"class {i}" for i in range(12)}
