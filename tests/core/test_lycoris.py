"""LyCORIS's files and sd-scripts', both ways: what one library saves, the other loads, with equal outputs."""

import contextlib
import copy
import io
import logging
import warnings

import hypothesis.strategies as st
import lycoris
import pytest
import torch
from hypothesis import given, settings
from lycoris.modules.ia3 import IA3Module
from safetensors.torch import load_file, save_file
from torch import nn

import graft
from graft import GraftError
from models import bert, move, picture, tokens

logging.getLogger("LyCORIS").setLevel(logging.ERROR)


class Net(nn.Module):
    """Every kind of layer LyCORIS adapts, with sizes that divide in various ways."""

    def __init__(self, inputs=12, outputs=16, kernel=(3, 3), groups=1, dilation=1):
        super().__init__()
        self.line = nn.Linear(inputs, outputs)
        self.bare = nn.Linear(outputs, inputs, bias=False)
        self.conv = nn.Conv2d(inputs, 2 * inputs, kernel, padding=1, groups=groups, dilation=dilation)
        self.row = nn.Conv1d(2 * inputs, outputs, 3, stride=2)
        self.point = nn.Conv1d(outputs, outputs, 1, bias=False)
        self.norm = nn.LayerNorm(outputs)
        self.groups = nn.GroupNorm(2, outputs)

    def forward(self, x):  # [batch, 9, 5, inputs]
        x = self.bare(self.line(x).tanh())
        x = self.conv(x.movedim(-1, 1)).flatten(2)
        return self.groups(self.point(self.norm(self.row(x).mT).mT))


def net(**sizes):
    torch.manual_seed(0)
    return Net(**sizes).double().eval()


def inputs(model):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 9, 5, model.line.in_features, generator=generator, dtype=torch.float64)


def same(a, b, name=""):
    """Equal but for rounding; LyCORIS keeps the magnitudes of DoRA in float32."""
    tolerance = 1e-5 if "dora" in name else 1e-9
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def network(model, algo, **options):
    """LyCORIS's network on every module of `model`, moved away from its start."""
    options = {"linear_dim": 3, "linear_alpha": 2.0, "warn_on_unmatched": False} | options
    with quiet(model):
        made = lycoris.create_lycoris(model, 1.0, algo=algo, preset="full", **options)
        made.apply_to()
    made.eval()
    torch.manual_seed(2)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return made


@contextlib.contextmanager
def quiet(model):
    """LyCORIS's modules in the precision of the model, without its messages."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(next(model.parameters()).dtype)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_default_dtype(before)


def theirs_from(model, file):
    with quiet(model):
        made, _ = lycoris.create_lycoris_from_weights(1.0, str(file), model)
        made.apply_to()
    return made.eval()


THERE = {
    "lora": ("lora", {}),
    "lora without scaling": ("lora", {"linear_alpha": 0}),
    "locon in Tucker form": ("locon", {"use_tucker": True}),
    "scalar": ("lora", {"use_scalar": True}),
    "rank-stabilised": ("lora", {"rs_lora": True}),
    "dora": ("lora", {"dora_wd": True}),
    "loha": ("loha", {}),
    "loha in Tucker form": ("loha", {"use_tucker": True}),
    "lokr": ("lokr", {"linear_dim": 1}),
    "lokr in Tucker form": ("lokr", {"linear_dim": 1, "use_tucker": True}),
    "lokr, both factors low-rank": ("lokr", {"linear_dim": 1, "decompose_both": True}),
    "lokr, full factors": ("lokr", {"full_matrix": True}),
    "lokr by a factor": ("lokr", {"linear_dim": 1, "factor": 2}),
    "full": ("full", {}),
}


@pytest.mark.parametrize("algo, options", THERE.values(), ids=THERE)
def test_saved_there_loads_here(tmp_path, algo, options):
    base = net()
    theirs = copy.deepcopy(base)
    made = network(theirs, algo, **options)
    made.save_weights(str(tmp_path / "a.safetensors"), None, {})
    ours = copy.deepcopy(base)
    adapter = graft.load(ours, tmp_path / "a.safetensors")
    assert len(adapter.deltas) == len(made.loras) == 5
    same(ours(inputs(ours)), theirs(inputs(base)), str(options))
    assert (ours(inputs(ours)) - base(inputs(base))).abs().max() > 1e-2


LAYERS = ["line", "bare", "conv", "row", "point"]
HERE = {
    "lora": (graft.LoRA(rank=3, alpha=5.0), LAYERS),
    "lora, ranks by module": (graft.LoRA(rank={"line": 2, "*": 4}, alpha={"conv": 3.0, "*": 7.0}), LAYERS),
    "rslora": (graft.LoRA(rank=3, rslora=True), LAYERS),
    "dora": (graft.DoRA(rank=3), LAYERS),
    "loha": (graft.LoHa(rank=2, alpha=3.0), LAYERS),
    "lokr": (graft.LoKr(rank=1, alpha=3.0), LAYERS),
    "lokr, full factors": (graft.LoKr(rank=8, alpha=3.0), LAYERS),
    "lokr, both factors low-rank": (graft.LoKr(rank=1, alpha=3.0, decompose_both=True), LAYERS),
    "lokr, the first factor low-rank": (graft.LoKr(rank=2, alpha=3.0, decompose_both=True), ["conv"]),
    "full": ("full", LAYERS),
    "ln_tuning": ("ln_tuning", ["norm", "groups"]),
}


@pytest.mark.parametrize("recipe, targets", HERE.values(), ids=HERE)
def test_saved_here_loads_there_and_here(tmp_path, recipe, targets):
    base = net()
    ours = copy.deepcopy(base)
    adapter = move(graft.attach(ours, recipe, targets, dtype=torch.float64))
    adapter.save(tmp_path / "a.safetensors", format="lycoris")
    expect = ours(inputs(ours))
    assert (expect - base(inputs(base))).abs().max() > 1e-2

    theirs = copy.deepcopy(base)
    made = theirs_from(theirs, tmp_path / "a.safetensors")
    assert len(made.loras) == len(targets)
    same(theirs(inputs(base)), expect, str(recipe))

    again = copy.deepcopy(base)
    loaded = graft.load(again, tmp_path / "a.safetensors")
    assert set(loaded.deltas) == set(targets)
    same(again(inputs(again)), expect)


@pytest.mark.parametrize("on", ["input", "output"])
def test_ia3_both_ways(tmp_path, on):
    """Module by module: LyCORIS's own loader of (IA)3 from weights takes one argument too few."""
    base, layers = net(), ["bare", "point"] if on == "output" else LAYERS
    ours, theirs = copy.deepcopy(base), copy.deepcopy(base)
    adapter = move(graft.attach(ours, graft.IA3(on=on), layers, dtype=torch.float64))
    adapter.save(tmp_path / "a.safetensors", format="lycoris")
    tensors = load_file(tmp_path / "a.safetensors")
    for path in layers:
        module = IA3Module(f"lycoris_{path}", theirs.get_submodule(path), train_on_input=on == "input").double()
        own = {key.partition(".")[2]: value for key, value in tensors.items() if key.startswith(f"lycoris_{path}.")}
        module.load_state_dict(own)
        assert module.state_dict().keys() == own.keys()
        module.apply_to()
    same(theirs(inputs(base)), ours(inputs(ours)))
    again = copy.deepcopy(base)
    graft.load(again, tmp_path / "a.safetensors")
    same(again(inputs(again)), ours(inputs(ours)))


sizes = st.sampled_from([4, 6, 8, 9, 12, 15, 16])


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(["lora", "dora", "loha", "lokr"]),
    inputs=sizes,
    outputs=sizes,
    rank=st.integers(1, 6),
    alpha=st.floats(0.5, 20),
    kernel=st.one_of(st.none(), st.tuples(st.integers(1, 3), st.integers(1, 3))),
    groups=st.sampled_from([1, 2]),
    dilation=st.integers(1, 2),
)
def test_any_shape_there_and_back(tmp_path_factory, name, inputs, outputs, rank, alpha, kernel, groups, dilation):
    """Ours to LyCORIS's file, LyCORIS's network from it, its file again, and ours from that: one function."""
    torch.manual_seed(3)
    if kernel is None:
        layer, x = nn.Linear(inputs, outputs), torch.randn(2, inputs)
    else:
        layer = nn.Conv2d(groups * inputs, groups * outputs, kernel, padding=1, groups=groups, dilation=dilation)
        x = torch.randn(2, groups * inputs, 6, 7)
    base = nn.Sequential(layer).double()
    x, folder = x.double(), tmp_path_factory.mktemp("any")
    ours, theirs, again = (copy.deepcopy(base) for _ in range(3))
    move(graft.attach(ours, name, "0", rank=rank, alpha=alpha, dtype=torch.float64)).save(
        folder / "a.safetensors", format="lycoris"
    )
    made = theirs_from(theirs, folder / "a.safetensors")
    same(theirs(x), ours(x), name)
    made.save_weights(str(folder / "b.safetensors"), None, {})
    graft.load(again, folder / "b.safetensors")
    same(again(x), ours(x), name)


def test_a_transformer_both_ways(tmp_path):
    base = bert()
    theirs, ours = bert(), bert()
    made = network(theirs, "lora")
    made.save_weights(str(tmp_path / "a.safetensors"), None, {})
    adapter = graft.load(ours, tmp_path / "a.safetensors")
    assert len(adapter.deltas) == len(made.loras) > 10
    ids = tokens()
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)
    adapter.save(tmp_path / "b.safetensors", format="lycoris")
    before, after = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert not torch.allclose(ours(ids).logits, base(ids).logits)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q = nn.Linear(4, 4)

    def forward(self, x):
        return self.to_q(x)


def pipeline(encoders=2):
    torch.manual_seed(0)
    names = ["text_encoder", "text_encoder_2"][:encoders]
    return nn.ModuleDict({"unet": nn.Sequential(Block()), **{name: nn.Sequential(Block()) for name in names}})


@pytest.mark.parametrize("encoders, prefixes", [(1, {"unet", "te"}), (2, {"unet", "te1", "te2"})])
def test_prefixes_of_sd_scripts(tmp_path, encoders, prefixes):
    """One file for the models of a pipeline, and for one of them alone."""
    models = pipeline(encoders)
    move(graft.attach(models, graft.LoRA(rank=2))).save(tmp_path / "a.safetensors", format="kohya")
    names = {key.partition(".")[0] for key in load_file(tmp_path / "a.safetensors")}
    assert names == {f"lora_{prefix}_0_to_q" for prefix in prefixes}
    again = pipeline(encoders)
    graft.load(again, tmp_path / "a.safetensors")
    x = torch.randn(2, 4)
    for part in again:
        torch.testing.assert_close(again[part](x), models[part](x))
    with pytest.raises(GraftError, match=r"ModuleDict.*'unet': ..., 'text_encoder': ..."):
        graft.load(pipeline(encoders)["unet"], tmp_path / "a.safetensors")

    alone = {k: v for k, v in load_file(tmp_path / "a.safetensors").items() if k.startswith("lora_unet_")}
    save_file(alone, tmp_path / "b.safetensors")
    unet = pipeline(encoders)["unet"]
    adapter = graft.load(unet, tmp_path / "b.safetensors")
    torch.testing.assert_close(unet(x), models["unet"](x))
    adapter.save(tmp_path / "c.safetensors", format="kohya")
    assert load_file(tmp_path / "c.safetensors").keys() == alone.keys()


def alike(kind=nn.Linear):
    """Two modules whose paths differ by dots alone."""
    return nn.ModuleDict({"a_b": kind(3, 3), "a": nn.ModuleDict({"b": nn.Linear(3, 3)}), "c": nn.Linear(3, 3)})


def test_paths_that_differ_by_dots_alone(tmp_path):
    adapter = graft.attach(alike(), graft.LoRA(rank=1), "all-linear")
    with pytest.raises(GraftError, match=r"a_b and a\.b"):
        adapter.save(tmp_path / "a.safetensors", format="lycoris")
    assert not (tmp_path / "a.safetensors").exists()
    graft.attach(alike(), graft.LoRA(rank=1), "c").save(tmp_path / "c.safetensors", format="lycoris")
    other = {k.replace("_c", "_a_b"): v for k, v in load_file(tmp_path / "c.safetensors").items()}
    save_file(other, tmp_path / "a.safetensors")
    with pytest.raises(GraftError, match=r"a_b or a\.b"):
        graft.load(alike(), tmp_path / "a.safetensors")


def rename(a, b):
    return lambda tensors: {key.replace(a, b): value for key, value in tensors.items()}


BROKEN = {
    "another base": (rename("line", "lines"), "no module for lycoris_lines"),
    "another prefix": (rename("lycoris_", "other_"), "prefixes lycoris, lora_unet"),
    "no prefix": (rename("lycoris_line.", ""), "no dot|prefixes"),
    "OFT": (lambda t: {"lycoris_line.oft_blocks": torch.zeros(4, 4, 4)}, "turn the outputs"),
    "GLoRA": (lambda t: t | {"lycoris_line.a1.weight": torch.zeros(2, 2)}, "GLoRA"),
    "magnitudes beside LoHa": (
        lambda t: (
            {f"lycoris_line.{k}": torch.ones(2, 2) for k in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")}
            | {"lycoris_line.dora_scale": torch.ones(16, 1)}
        ),
        "beside a LoRA alone",
    ),
    "magnitudes of columns": (lambda t: t | {"lycoris_line.dora_scale": torch.ones(1, 12)}, "wd_on_output=False"),
    "two methods": (lambda t: t | {"lycoris_bare.diff": torch.zeros(12, 16)}, "of one method.*full.*lora"),
    "a tensor lost": (lambda t: {k: v for k, v in t.items() if "up" not in k}, "no method here has the tensors"),
    "another shape": (lambda t: {k: v[:, :2].clone() if "down" in k else v for k, v in t.items()}, "shape"),
    "a value that is none": (lambda t: t | {"lycoris_line.alpha": torch.tensor(float("inf"))}, "infinity"),
    "an alpha that is none": (lambda t: t | {"lycoris_line.alpha": torch.ones(2)}, "cannot be read"),
    "a rank from nowhere": (lambda t: t | {"lycoris_line.lora_down.weight": torch.zeros(0, 12)}, "rank"),
    "factors beyond reason": (
        lambda t: {
            "lycoris_line.lokr_w1": torch.ones(2, 2),
            "lycoris_line.lokr_w2_a": torch.ones(100_000, 4),
            "lycoris_line.lokr_w2_b": torch.ones(4, 100_000),
        },
        "far larger",
    ),
    "a core beyond reason": (
        lambda t: {
            "lycoris_conv.lora_up.weight": torch.ones(24, 1, 1, 1),
            "lycoris_conv.lora_mid.weight": torch.ones(1, 1, 300, 300),
            "lycoris_conv.lora_down.weight": torch.ones(1, 100_000, 1, 1),
        },
        "far larger",
    ),
    "nothing": (lambda t: {}, "no tensor"),
}


@pytest.mark.parametrize("change, words", BROKEN.values(), ids=BROKEN)
def test_what_cannot_be_read_is_refused_and_leaves_the_model(tmp_path, change, words):
    model = net()
    adapter = move(graft.attach(net(), graft.LoRA(rank=2), "line"))
    adapter.save(tmp_path / "a.safetensors", format="lycoris")
    tensors = change(load_file(tmp_path / "a.safetensors"))
    save_file(tensors, tmp_path / "a.safetensors")
    before = picture(model)
    with pytest.raises(GraftError, match=words):
        graft.load(model, tmp_path / "a.safetensors")
    assert picture(model) == before


def test_a_file_that_is_none(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(GraftError, match="no sound safetensors"):
        graft.load(net(), tmp_path / "a.safetensors")
    torch.save({"lycoris_line.lora_up.weight": torch.zeros(2, 2)}, tmp_path / "a.pt")
    with pytest.raises(GraftError, match="pickle, which is never read"):
        graft.load(net(), tmp_path / "a.pt")


UNWRITTEN = {
    "a method it lacks": (lambda: graft.attach(net(), "vera", "line"), "no format for vera"),
    "another OFT": (lambda: graft.attach(net(), graft.OFT(block=4), "line"), "turns the outputs"),
    "heads": (lambda: graft.attach(net(), graft.LoRA(rank=1), "line", heads="bare"), "heads"),
    "an embedding": (lambda: graft.attach(nn.Sequential(nn.Embedding(3, 4)), graft.LoRA(rank=1), "0"), "Embedding"),
    "padding": (
        lambda: graft.attach(
            nn.Sequential(nn.Conv1d(2, 2, 3, padding=1, padding_mode="circular")), graft.LoRA(rank=1), "0"
        ),
        "pads",
    ),
    "the bias of scaled outputs": (lambda: graft.attach(net(), graft.IA3(on="output"), "line"), "bias"),
    "a norm without bias": (lambda: graft.attach(nn.Sequential(nn.LayerNorm(4, bias=False)), "ln_tuning"), "bias"),
    "a first factor that is the larger": (lambda: graft.attach(net(), graft.LoKr(factor=12), "line"), "smaller one"),
}


@pytest.mark.parametrize("make, words", UNWRITTEN.values(), ids=UNWRITTEN)
def test_what_lycoris_computes_otherwise_is_not_written(tmp_path, make, words):
    with pytest.raises(GraftError, match=words):
        make().save(tmp_path / "a.safetensors", format="lycoris")
    assert not list(tmp_path.iterdir())


def test_a_file_is_not_overwritten_unless_asked(tmp_path):
    adapter = graft.attach(net(), graft.LoRA(rank=2), "line")
    adapter.save(tmp_path / "new" / "a.safetensors", format="lycoris")
    first = (tmp_path / "new" / "a.safetensors").read_bytes()
    move(adapter)
    with pytest.raises(GraftError, match="overwrite=True"):
        adapter.save(tmp_path / "new" / "a.safetensors", format="lycoris")
    assert (tmp_path / "new" / "a.safetensors").read_bytes() == first
    adapter.save(tmp_path / "new" / "a.safetensors", format="lycoris", overwrite=True)
    assert (tmp_path / "new" / "a.safetensors").read_bytes() != first
    with pytest.raises(GraftError, match=r"end in \.safetensors"):
        adapter.save(tmp_path / "b", format="lycoris")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a.safetensors"]
