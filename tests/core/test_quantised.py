"""Quantised linear layers: what an adapter on one computes, against the dense computation with the decoded weight."""

import copy
import json
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import graft
from graft.core.sites.quantised import quantised_sites
from models import llama, move, tokens

IN, OUT = 128, 64


def torch_int8(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch would have torchao used instead
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def torchao_with(name, **options):
    def convert(model):
        made = pytest.importorskip("torchao.quantization")
        model = copy.deepcopy(model)
        made.quantize_(model, getattr(made, name)(**options))
        return model

    return convert


def of_bitsandbytes(make):
    def convert(model):
        bnb, model = pytest.importorskip("bitsandbytes"), copy.deepcopy(model)
        for path, module in list(model.named_modules()):
            if type(module) is nn.Linear:
                made = make(bnb.nn, module.in_features, module.out_features, module.bias is not None)
                made.load_state_dict(module.state_dict())
                parent, _, name = path.rpartition(".")
                setattr(model.get_submodule(parent), name, made.to("cpu"))
        return model.eval()

    return convert


# Those which leave inputs alone compute F.linear with the decoded weight; the others round x as well.
WEIGHT_ONLY = {
    "torchao-int8": torchao_with("Int8WeightOnlyConfig"),
    "torchao-int4": torchao_with("IntxWeightOnlyConfig", weight_dtype=torch.int4),
    "bitsandbytes-nf4": of_bitsandbytes(
        lambda nn, i, o, b: nn.Linear4bit(i, o, b, quant_type="nf4", compute_dtype=torch.float32)
    ),
    "bitsandbytes-fp4-plain-scales": of_bitsandbytes(
        lambda nn, i, o, b: nn.Linear4bit(
            i, o, b, quant_type="fp4", compress_statistics=False, compute_dtype=torch.float32
        )
    ),
}
QUANTISERS = WEIGHT_ONLY | {
    "torch-int8": torch_int8,
    "torchao-int8-of-inputs": torchao_with("Int8DynamicActivationInt8WeightConfig"),
    "bitsandbytes-int8": of_bitsandbytes(lambda nn, i, o, b: nn.Linear8bitLt(i, o, b, has_fp16_weights=False)),
}
each = pytest.mark.parametrize("name", QUANTISERS)
each_weight_only = pytest.mark.parametrize("name", WEIGHT_ONLY)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(IN, OUT), nn.Tanh(), nn.Linear(OUT, OUT, bias=False)).eval()


def inputs(rows=3):
    return torch.randn(rows, IN, generator=torch.Generator().manual_seed(5), requires_grad=True)


def quantised(name):
    return QUANTISERS[name](network())


def site(model, path="0"):
    return next(s for s in quantised_sites(model) if s.path == path)


def gradients(y, *of):
    return torch.autograd.grad((y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum(), of)


@each
def test_lora_adds_its_product_to_the_quantised_layer_and_passes_the_decoded_gradient(name):
    model, x = quantised(name)[:1], inputs()
    before = model(x.detach().clone().requires_grad_()).detach()
    w = site(model).weight.detach()
    torch.testing.assert_close(before, F.linear(x, w, site(model).bias), rtol=0.1, atol=0.02)  # it is that matrix
    adapter = move(graft.attach(model, "lora", "0", rank=4))
    delta = adapter.deltas["0"]
    A, B = delta.factors()
    y = model(x)
    torch.testing.assert_close(y, before + x @ (B @ A).T)
    dense = F.linear(x, w + B @ A)
    found = gradients(y, x, *adapter.parameters())
    for ours, theirs in zip(found, gradients(dense, x, *adapter.parameters())):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    again = checkpoint(model, x, use_reentrant=False)
    assert torch.equal(gradients(again, x)[0], found[0])


METHODS = ["lora", "dora", "ia3", "oft", "hra", "shira", "loha", "vera", "bitfit"]


@each_weight_only
@pytest.mark.parametrize("method", [*METHODS, "pissa"])
def test_an_adapter_computes_what_it_does_on_the_decoded_weight(name, method):
    model, x = quantised(name), inputs()
    plain = graft.dequantise(copy.deepcopy(model))
    assert {type(m) for m in plain} == {nn.Linear, nn.Tanh} and not quantised_sites(plain)
    hyper = {"init": "pissa", "rank": 4} if method == "pissa" else graft.METHODS[method].small
    found = []
    for base in (model, plain):
        paths = ["0"] if method == "bitfit" else ["0", "2"]  # the second layer has no bias
        adapter = move(graft.attach(base, "lora" if method == "pissa" else method, paths, **hyper))
        y = base(x)
        trained = [p for p in adapter.parameters() if p.requires_grad]
        found.append([y, *gradients(y, x, *trained)])
    for ours, theirs in zip(*found):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@each
def test_the_gradient_passes_quantised_layers_without_an_adapter(name):
    model, x = quantised(name), inputs()
    last = site(model, "2").weight.detach()
    adapter = move(graft.attach(model, "lora", "0", rank=4), by=0.02)
    y = model(x)
    h = model[:2](x)
    g = torch.linspace(-1, 1, y.numel()).view_as(y)
    ours = torch.autograd.grad((y * g).sum(), adapter.parameters())
    for a, r in zip(ours, torch.autograd.grad(h, adapter.parameters(), g @ last)):
        torch.testing.assert_close(a, r, rtol=1e-3, atol=1e-3)


@each
def test_the_base_is_as_it_was_after_the_adapter_left(name):
    model, x = quantised(name), inputs()
    y, print_before = model(x), graft.fingerprint(model)
    keys = [(type(m), sorted(m.__dict__)) for m in model.modules()]
    adapter = move(graft.attach(model, "lora", ["0", "2"], rank=4))
    assert graft.fingerprint(model) == print_before
    with adapter.disabled():
        assert torch.equal(model(x), y)
    with torch.no_grad():
        model(x)
    y_adapted = model(x)
    twins = [copy.deepcopy(model)]
    if "torchao" not in name:  # which sets a function on its modules that cannot be pickled
        twins.append(pickle.loads(pickle.dumps(model)))
    for twin in twins:
        assert torch.equal(twin(x), y_adapted)
        graft.adapters(twin)["default"].detach()
        assert torch.equal(twin(x), y)
    adapter.detach()
    assert [(type(m), sorted(m.__dict__)) for m in model.modules()] == keys
    assert torch.equal(model(x), y) and graft.fingerprint(model) == print_before


@each
def test_saved_and_loaded_is_bit_identical_and_another_base_is_refused(name, tmp_path):
    model, x = quantised(name), inputs()
    adapter = move(graft.attach(model, "lora", ["0", "2"], rank=4))
    adapter.save(tmp_path / "adapter")
    again = quantised(name)
    graft.load(again, tmp_path / "adapter", trainable=True)
    assert torch.equal(again(x), model(x))
    with pytest.raises(graft.GraftError, match="has other weights"):
        graft.load(network(), tmp_path / "adapter")
    with torch.no_grad():
        other = network()
        other[0].weight.neg_()
    with pytest.raises(graft.GraftError, match="has other weights"):
        graft.load(QUANTISERS[name](other), tmp_path / "adapter")


@each_weight_only
def test_rows_of_one_batch_use_different_adapters(name):
    model, x = quantised(name), inputs()
    for i, method in enumerate(("lora", "dora", "ia3")):
        move(graft.attach(model, method, ["0", "2"], name=f"a{i}", **graft.METHODS[method].small), seed=i)
    rows = ["a2", None, "a0"]
    with graft.route(model, rows):
        together = model(x)
    for i, row in enumerate(rows):
        graft.activate(model, *([row] if row else []))
        torch.testing.assert_close(together[i], model(x[i : i + 1])[0], rtol=1e-4, atol=1e-4)


@each
def test_merging_is_refused_until_the_base_is_dequantised(name):
    model, x = quantised(name), inputs()
    adapter = move(graft.attach(model, "lora", "0", rank=4), by=0.05)
    second = move(graft.attach(model, "dora", ["0", "2"], rank=4, name="second"), by=0.05)
    second.requires_grad_(False)
    picture = graft.fingerprint(model)
    for merge in (graft.merge, graft.merged_state_dict):
        with pytest.raises(
            graft.GraftError, match=r"is quantised \(Linear.*graft.dequantise\(model\) gives it a plain"
        ):
            merge(model)
    assert graft.fingerprint(model) == picture
    weights = {p: site(model, p).weight for p in "02"}
    expect = {p: model.get_submodule(p).chain.weight for p in "02"}
    assert graft.dequantise(model) is model and not adapter.attached
    assert list(graft.adapters(model)) == ["default", "second"]
    assert [p.requires_grad for a in graft.adapters(model).values() for p in a.parameters()] == [True] * 2 + [False] * 6
    assert all(torch.equal(model.get_submodule(p).weight, weights[p]) for p in "02")
    y = model(x)
    graft.merge(model).keep()
    torch.testing.assert_close(model(x), y)
    for p in "02":
        torch.testing.assert_close(model.get_submodule(p).weight, expect[p])


@each
def test_frozen_weights_take_the_bytes_of_their_codes(name):
    model = quantised(name)
    graft.attach(model, "lora", ["0", "2"], rank=4)
    dense = 4 * OUT * (IN + OUT)
    held = sum(t.nbytes for s in quantised_sites(model) for t in s.codes().values())
    bits = 4.6 if "nf4" in name or "fp4" in name else 9
    assert held < dense * bits / 32 + 4 * OUT * 2


@each
def test_training_steps_do_not_change_the_codes(name):
    model, x = quantised(name).train(), inputs()
    before = {s.path: {k: t.clone() for k, t in s.codes().items()} for s in quantised_sites(model)}
    adapter = graft.attach(model, "lora", ["0", "2"], rank=4)
    optimizer, losses = torch.optim.Adam(adapter.parameters(), 1e-2), []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (model(x) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    for s in quantised_sites(model):
        assert all(torch.equal(t, before[s.path][k]) for k, t in s.codes().items())


def test_a_module_that_was_packed_for_inference_can_be_trained_through():
    model, x = quantised("bitsandbytes-nf4"), inputs()
    w = site(model).weight
    with torch.no_grad():
        model(x)
    torch.testing.assert_close(site(model).weight, w, rtol=0.01, atol=1e-3)  # its scales are rounded to bfloat16
    w = site(model, "2").weight
    adapter = move(graft.attach(model, "lora", "0", rank=4), by=0.02)
    with torch.no_grad():
        model(x)
    y = model(x)
    g = torch.linspace(-1, 1, y.numel()).view_as(y)
    ours = torch.autograd.grad((y * g).sum(), adapter.parameters())
    for a, r in zip(ours, torch.autograd.grad(model[:2](x), adapter.parameters(), g @ w)):
        torch.testing.assert_close(a, r, rtol=1e-4, atol=1e-4)


@each
def test_loftq_makes_up_for_what_rounding_lost(name):
    original, model = network(), quantised(name)
    w, q = original[0].weight.detach(), site(model).weight.detach()
    stats = graft.collect(original, (), needs=["weight"], targets="0")
    adapter = graft.attach(model, "lora", "0", rank=8, init="loftq", stats=stats)
    near = adapter.deltas["0"].weight(q)
    lost = torch.linalg.svdvals((w - q).float())
    torch.testing.assert_close((w - near).norm(), lost[8:].norm(), rtol=1e-4, atol=0)
    assert (w - near).norm() < (w - q).norm()


@each
def test_presets_find_the_same_matrices_as_in_the_original_model(name):
    model = QUANTISERS[name](llama(layers=1, hidden_size=64, intermediate_size=64))
    for preset in ("all-linear", "attention", "mlp", "qv"):
        paths = list(graft.attach(llama(layers=1, hidden_size=64, intermediate_size=64), "lora", preset).deltas)
        adapter = graft.attach(model, "lora", preset)
        assert list(adapter.deltas) == paths
        model(tokens()).logits.sum().backward()
        assert all(d.B.grad.abs().sum() > 0 for d in adapter.deltas.values())
        adapter.detach()


@each_weight_only
def test_a_file_for_peft_is_that_of_the_plain_base(name, tmp_path):
    model = WEIGHT_ONLY[name](network())
    plain = graft.dequantise(copy.deepcopy(model))
    for base, folder in ((model, "a"), (plain, "b")):
        move(graft.attach(base, "lora", ["0", "2"], rank=4)).save(tmp_path / folder, format="peft")
    a, b = (json.loads((tmp_path / folder / "adapter_config.json").read_text()) for folder in "ab")
    assert a == b
    a, b = ((tmp_path / folder / "adapter_model.safetensors").read_bytes() for folder in "ab")
    assert a == b


@each
def test_statistics_of_inputs_are_collected_and_those_of_its_gradients_refused(name):
    model, x = quantised(name), inputs().detach()
    found = graft.collect(model, [x], ["input_gram"], "0", loss=lambda m, b: m(b).sum())
    torch.testing.assert_close(found["0"]["input_gram"], x.T @ x)
    with pytest.raises(graft.GraftError, match="weight_grad is a statistic of gradients, and the weight of 0 is quant"):
        graft.collect(model, [x], ["weight_grad"], "0", loss=lambda m, b: m(b).sum())


def test_gradients_of_a_plain_layer_below_a_quantised_one_are_collected():
    plain, x = network(), inputs().detach()
    model = nn.Sequential(plain[0], plain[1], torch_int8(plain)[2])
    loss = lambda m, b: (m(b) * torch.linspace(-1, 1, 3 * OUT).view(3, OUT)).sum()
    found = graft.collect(model, [x], ["weight_grad"], "0", loss=loss)
    w = site(model, "2").weight
    g = torch.linspace(-1, 1, 3 * OUT).view(3, OUT) @ w * (1 - plain[:2](x).square())
    torch.testing.assert_close(found["0"]["weight_grad"], g.T @ x, rtol=1e-4, atol=1e-4)
    assert "forward" not in model[2].__dict__


class Coded(nn.Linear):
    """Codes of another library."""

    def __init__(self):
        super().__init__(4, 4, bias=False)
        self.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)


def test_codes_that_nobody_decodes_are_refused_by_name():
    with pytest.raises(graft.GraftError, match=r"0 \(Coded\) keeps its weight as codes of type torch.int8"):
        graft.attach(nn.Sequential(Coded()), "lora", "0")


def test_full_fine_tuning_is_refused():
    with pytest.raises(graft.GraftError, match="full cannot work at 0: its weight is quantised"):
        graft.attach(quantised("torch-int8"), "full", "0")
