"""graft.quantise: what becomes of the weights, and which layers are left alone."""

import copy
import importlib.util
import subprocess
import sys

import pytest
import torch
from torch import nn

import graft
from graft.core.quantise import scheme_of
from graft.core.quantised import schemes
from graft.core.sites.quantised import quantised_sites
from models import llama, move, tokenizer, tokens

PACKAGES = {name: scheme.package for name, scheme in schemes().items()}
# The values of NormalFloat4, from the appendix of QLoRA, rounded.
NF4 = [-1, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0, 0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626,
       0.7230, 1]  # fmt: skip


@pytest.fixture(params=schemes())
def scheme(request):
    if package := PACKAGES[request.param]:
        pytest.importorskip(package)
    return request.param


def model(dtype=torch.float32):
    return llama(dtype, layers=1, hidden_size=64, intermediate_size=128)


def linears(model):
    return {p: m for p, m in model.named_modules() if type(m) is nn.Linear}


def test_each_weight_is_the_nearest_value_that_its_codes_have(scheme):
    plain = model()
    made = graft.quantise(copy.deepcopy(plain), scheme)
    sites = {s.path: s for s in quantised_sites(made)}
    assert sites.keys() == {p for p in linears(plain) if p != "lm_head"} and scheme_of(made) == scheme
    for path, site in sites.items():
        w = plain.get_submodule(path).weight.detach()
        if scheme == "nf4":
            blocks = w.reshape(-1, 64)
            size = blocks.abs().amax(1, keepdim=True)
            values = torch.tensor(NF4)
            near = (values[(blocks / size)[..., None].sub(values).abs().argmin(-1)] * size).view_as(w)
            # The scales are rounded to 8 bits themselves, by which a weight near the middle of two values may fall.
            wrong = (site.weight - near).abs() > 0.02 * w.abs().max()
            assert wrong.float().mean() < 0.01
        else:
            step = w.abs().amax(1, keepdim=True) / 127
            assert ((site.weight - w).abs() <= 0.51 * step).all()


def test_an_adapter_learns_beside_the_codes_and_comes_back(scheme, tmp_path):
    made = graft.quantise(model(), scheme)
    adapter = move(graft.attach(made, "lora", rank=2))
    made(tokens()).logits.square().mean().backward()
    assert all(p.grad.abs().sum() > 0 for p in adapter.parameters())
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    y = made(tokens()).logits
    adapter.save(tmp_path / "adapter")
    again = graft.quantise(model(), scheme)
    graft.load(again, tmp_path / "adapter")
    assert torch.equal(again(tokens()).logits, y)
    with pytest.raises(graft.GraftError, match=rf"was trained on .*, quantised by {scheme}, and this .* other weights"):
        graft.load(model(), tmp_path / "adapter")
    graft.load(model(), tmp_path / "adapter", allow_other_base=True)
    assert f'graft.quantise(model, "{scheme}")'.replace('"', "'") in (tmp_path / "adapter/README.md").read_text()


def test_a_precision_in_which_codes_do_not_compute_is_refused():
    made = graft.quantise(model(), "int8")
    graft.attach(made, "lora", rank=2)
    rows = [{"text": "one"}]
    for run in (graft.fit, graft.evaluate, graft.predict):
        with pytest.raises(
            graft.GraftError, match=r"q_proj is quantised and computes in float32 alone: leave precision"
        ):
            run(made, rows, processor=tokenizer(), objective="causal-lm", precision="bf16")


def test_an_adapter_of_the_plain_base_is_refused_on_codes(tmp_path):
    plain = model()
    move(graft.attach(plain, "lora", rank=2)).save(tmp_path / "adapter")
    assert scheme_of(plain) is None
    with pytest.raises(graft.GraftError, match="which was not quantised, and this LlamaForCausalLM has other weights"):
        graft.load(graft.quantise(model(), "int8"), tmp_path / "adapter")


def test_what_is_left_out_stays(scheme):
    made = model()
    shared = made.model.layers[0].self_attn
    shared.k_proj.weight = shared.q_proj.weight  # codes cannot be tied
    before = linears(made)
    graft.quantise(made, scheme, leave=["model.layers.0.mlp"])
    left = linears(made)
    kept = {f"model.layers.0.mlp.{n}_proj" for n in ("gate", "up", "down")} | {"lm_head"}
    tied = {f"model.layers.0.self_attn.{n}_proj" for n in "qk"}
    assert {p for p, m in left.items() if m is before.get(p) and not hasattr(m, "quantised_as")} == kept | tied
    assert {s.path.rpartition(".")[2] for s in quantised_sites(made)} == {"v_proj", "o_proj"}


def test_refusals(monkeypatch):
    with pytest.raises(graft.GraftError, match=r"called 'int9'; there are int8 \(torch's own.*; int8-weights \(.*nf4"):
        graft.quantise(model(), "int9")
    with pytest.raises(graft.GraftError, match=r"int8 computes in float32, and model.layers.0.* is bfloat16: load the"):
        graft.quantise(model(torch.bfloat16), "int8")
    done = graft.quantise(model(), "int8")
    with pytest.raises(
        graft.GraftError, match=r"'all-linear' picks no torch.nn.Linear that can be quantised in this Ll"
    ):
        graft.quantise(done, "int8")
    adapted = model()
    graft.attach(adapted, "lora", name="mine")
    with pytest.raises(graft.GraftError, match="the model carries the adapter 'mine': quantise it before"):
        graft.quantise(adapted, "int8")
    with pytest.raises(graft.GraftError, match=r"int8 computes on cpu only, not on meta: .* one of int8-weights, nf4"):
        graft.quantise(model().to("meta"), "int8")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(graft.GraftError, match=r"nf4 needs bitsandbytes: pip install 'graft\[quantised\]'"):
        graft.quantise(model(), "nf4")


def test_schemes_are_there_in_a_process_that_begins_with_them():
    """Whatever else was imported before, or nothing."""
    begin = "import torch, graft; print(graft.quantise(torch.nn.Sequential(torch.nn.Linear(8, 8)), 'int8')[0])"
    ran = subprocess.run([sys.executable, "-c", begin], capture_output=True, text=True)
    assert "DynamicQuantizedLinear" in ran.stdout, ran.stderr
