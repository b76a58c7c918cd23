"""The folders of the library `adapters`, both ways: what one library saves, the other loads, with equal outputs."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import graft
import models
from graft import GraftError
from models import move, picture, tokens

adapters = pytest.importorskip("adapters")
transformers = pytest.importorskip("transformers")

WIDE = dict(initializer_range=0.3)  # so that what a block computes shows in the outputs
SIZES = WIDE | dict(hidden_size=32, num_hidden_layers=2, intermediate_size=48, num_attention_heads=4)


def roberta():
    torch.manual_seed(0)
    config = transformers.RobertaConfig(**SIZES, vocab_size=50, max_position_embeddings=64, num_labels=3)
    return transformers.RobertaForSequenceClassification(config).eval()


def distilbert():
    torch.manual_seed(0)
    config = transformers.DistilBertConfig(
        **WIDE, dim=32, n_layers=2, hidden_dim=48, n_heads=4, vocab_size=50, max_position_embeddings=64
    )
    return transformers.DistilBertForSequenceClassification(config).eval()


def vit():
    torch.manual_seed(0)
    return transformers.ViTForImageClassification(transformers.ViTConfig(**SIZES, image_size=8, patch_size=2)).eval()


def bert():
    return models.bert(**WIDE)


def llama():
    return models.llama(**WIDE)


def gpt2():
    return models.gpt2(**WIDE)


MODELS = {"bert": bert, "roberta": roberta, "distilbert": distilbert, "gpt2": gpt2, "llama": llama, "vit": vit}


def outputs(model, mask=None):
    with torch.no_grad():
        if model.config.model_type == "vit":
            generator = torch.Generator().manual_seed(0)
            return model(torch.randn(3, 3, 8, 8, generator=generator)).logits
        return model(tokens(), attention_mask=mask).logits


def trained_there(make, config, folder, with_head=True):
    theirs = make()
    adapters.init(theirs)
    theirs.add_adapter("mine", config=config)
    theirs.set_active_adapters("mine")
    theirs.eval()
    torch.manual_seed(4)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if ".mine." in name and "parametrizations" not in name:
                p.add_(0.2 * torch.randn_like(p))
        for module in theirs.modules():
            if isinstance(module, nn.Linear) and hasattr(module, "parametrizations"):
                module.weight = nn.init.orthogonal_(torch.empty_like(module.weight))
                own = module.parametrizations.weight
                own.original.data = own.original.data.contiguous()
    theirs.save_adapter(folder, "mine", with_head=with_head, use_safetensors=True)
    return theirs


THERE = {
    "seq_bn": adapters.SeqBnConfig(reduction_factor=8),
    "seq_bn of several sizes": adapters.SeqBnConfig(reduction_factor={"0": 4, "default": 10.5}, non_linearity="gelu"),
    "seq_bn, a block left out": adapters.SeqBnConfig(reduction_factor=8, leave_out=[0], non_linearity="tanh"),
    "double_seq_bn": adapters.DoubleSeqBnConfig(reduction_factor=8),
    "par_bn": adapters.ParBnConfig(reduction_factor=8, scaling=3.0),
    "lora": adapters.LoRAConfig(r=3, alpha=5),
    "lora of all matrices": adapters.LoRAConfig(
        r=2, attn_matrices=["q", "k"], intermediate_lora=True, output_lora=True, leave_out=[1]
    ),
    "ia3": adapters.IA3Config(),
    "dora": adapters.DoRAConfig(r=2, alpha=2),
    "loreft": adapters.LoReftConfig(r=2, prefix_positions=2, suffix_positions=3),
    "loreft at the start": adapters.LoReftConfig(r=2, layers=[1]),
    "loreft, tied": adapters.LoReftConfig(r=3, prefix_positions=1, suffix_positions=2, tied_weights=True),
}
FUSED = "gpt2 fuses query, key and value"
NOT_HERE = {("gpt2", name): FUSED for name in ("lora", "lora of all matrices", "ia3", "dora")}
NOT_HERE |= {(model, "par_bn"): "the state before the norm is read" for model in ("gpt2", "llama", "vit")}
NOT_HERE |= {(model, "dora"): "biases" for model in ("bert", "roberta", "distilbert", "vit")}


@pytest.mark.parametrize("model, name", [(m, n) for m in MODELS for n in THERE if (m, n) not in NOT_HERE])
def test_saved_there_loads_here_and_there_again(tmp_path, model, name):
    make = MODELS[model]
    theirs = trained_there(make, THERE[name], tmp_path / "theirs")
    expect = outputs(theirs)
    assert (expect - outputs(make())).abs().max() > 1e-3
    ours = make()
    adapter = graft.load(ours, tmp_path / "theirs")
    assert adapter.name == "mine" and not adapter.heads  # the head is the base's
    torch.testing.assert_close(outputs(ours), expect, rtol=1e-4, atol=1e-5)

    adapter.save(tmp_path / "ours", format="adapters")
    again = make()
    adapters.init(again)
    info = {}
    again.load_adapter(str(tmp_path / "ours"), use_safetensors=True, set_active=True, loading_info=info)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    torch.testing.assert_close(outputs(again.eval()), expect, rtol=1e-4, atol=1e-5)
    before, after = (load_file(tmp_path / folder / "adapter.safetensors") for folder in ("theirs", "ours"))
    assert before.keys() == after.keys()


HERE = {
    "pfeiffer": dict(size=5, activation="silu"),
    "houlsby": dict(size=5, activation="relu"),
    "parallel_adapter": dict(size=7, scaling=2.5),
    "lora": dict(rank=3, alpha=2.0, rslora=True, targets="qv"),
    "ia3": dict(on="output", targets=r".*(key|value|k_lin|v_lin|k_proj|v_proj)"),
    "loreft": dict(rank=2, first=2, last=0),
    "dora": dict(rank=2, alpha=5.0, targets="qv"),
}


@pytest.mark.parametrize("model, name", [(m, n) for m in MODELS for n in HERE
                                         if (m, {"parallel_adapter": "par_bn"}.get(n, n)) not in NOT_HERE])  # fmt: skip
def test_saved_here_loads_there(tmp_path, model, name):
    make, options = MODELS[model], dict(HERE[name])
    ours = make()
    adapter = move(graft.attach(ours, name, options.pop("targets", None), name="mine", **options))
    adapter.save(tmp_path / "a", format="adapters")
    theirs = make()
    adapters.init(theirs)
    info = {}
    theirs.load_adapter(str(tmp_path / "a"), use_safetensors=True, set_active=True, loading_info=info)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    expect = outputs(ours)
    assert (expect - outputs(make())).abs().max() > 1e-3
    torch.testing.assert_close(outputs(theirs.eval()), expect, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_positions_of_loreft_skip_the_padding(tmp_path, padding):
    theirs = trained_there(bert, THERE["loreft"], tmp_path)
    ours = bert()
    graft.load(ours, tmp_path)
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[0, : 2 if padding == "left" else None][-2 if padding == "right" else None :] = 0
    torch.testing.assert_close(outputs(ours, mask), outputs(theirs, mask), rtol=1e-4, atol=1e-5)


def test_heads_both_ways(tmp_path):
    def trained():
        model = bert()
        nn.init.normal_(model.classifier.weight, generator=torch.Generator().manual_seed(9))
        return model

    theirs = trained_there(trained, THERE["seq_bn"], tmp_path / "theirs")
    ours = bert()
    adapter = graft.load(ours, tmp_path / "theirs")
    assert [path for path, _ in adapter.heads] == ["classifier"]
    torch.testing.assert_close(outputs(ours), outputs(theirs), rtol=1e-4, atol=1e-5)
    adapter.save(tmp_path / "ours", format="adapters")
    again = bert()
    adapters.init(again)
    again.load_adapter(str(tmp_path / "ours"), use_safetensors=True, set_active=True)
    torch.testing.assert_close(outputs(again.eval()), outputs(theirs), rtol=1e-4, atol=1e-5)


OTHERS = {
    "seq_bn_inv": (bert, adapters.SeqBnInvConfig(), "inv_adapter='nice'"),
    "compacter": (bert, adapters.CompacterConfig(reduction_factor=8, phm_dim=2), "phm_layer=True"),
    "learned scaling": (bert, adapters.ParBnConfig(scaling="learned"), "scaling"),
    "gating": (bert, adapters.SeqBnConfig(use_gating=True), "use_gating=True"),
    "layer norms of its own": (bert, adapters.SeqBnConfig(ln_after=True), "ln_after=True"),
    "another residual": (bert, adapters.SeqBnConfig(residual_before_ln=False), "residual_before_ln=False"),
    "another activation": (bert, adapters.SeqBnConfig(non_linearity="gelu_new"), "gelu_new"),
    "vera": (bert, adapters.VeraConfig(), "vera_[bd]="),
    "mtl_lora": (bert, adapters.MTLLoRAConfig(), "mtl_lora"),
    "dora with biases": (bert, adapters.DoRAConfig(r=2, alpha=2), "bias"),
    "dora with alpha": (llama, adapters.DoRAConfig(r=2, alpha=4), "alpha=4"),
    "ia3 with alpha": (bert, adapters.IA3Config(alpha=2), "alpha=2"),
    "noreft": (bert, adapters.NoReftConfig(), "orthogonality=False"),
    "prompt_tuning": (bert, adapters.PromptTuningConfig(prompt_length=3), "behind the positions"),
    "par_bn on Llama": (llama, adapters.ParBnConfig(), "not for llama"),
    "fused matrices": (gpt2, adapters.LoRAConfig(), r"no place for transformer\.h\.[01]\.attn\.c_attn"),
}


@pytest.mark.parametrize("make, config, words", OTHERS.values(), ids=OTHERS)
def test_what_we_do_not_have_is_refused_and_leaves_the_model(tmp_path, make, config, words):
    trained_there(make, config, tmp_path)
    model = make()
    before = picture(model)
    with pytest.raises(GraftError, match=words):
        graft.load(model, tmp_path)
    assert picture(model) == before


def rewrite(folder, change):
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda c: c.update(version="adapters.1.0.1"), "1.1 or later"),
        (lambda c: c.pop("version"), "version unknown"),
        (lambda c: c.update(name="other"), "not of the adapter 'other'"),
        (lambda c: c["config"].update(wonder=3), "wonder=3"),
        (lambda c: c["config"].pop("r"), "lacks r"),
        (lambda c: c["config"].update(r="three"), "rank"),
        (lambda c: c["config"].update(r=5), "shape"),
        (lambda c: c["config"].update(alpha=None), "cannot be read"),
    ],
)
def test_configurations_that_are_wrong(tmp_path, change, words):
    trained_there(bert, THERE["lora"], tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(GraftError, match=words):
        graft.load(bert(), tmp_path)


def test_tensors_that_are_wrong(tmp_path):
    trained_there(bert, THERE["lora"], tmp_path)
    tensors = load_file(tmp_path / "adapter.safetensors")
    for change, words in (
        ({k.replace("layer.1", "layer.7"): v for k, v in tensors.items()}, "right base"),
        (dict(list(tensors.items())[1:]), "missing"),
        ({k.replace(".loras.", ".adapters."): v for k, v in tensors.items()}, "no counterpart"),
        ({}, "no tensor"),
    ):
        save_file(change, tmp_path / "adapter.safetensors")
        with pytest.raises(GraftError, match=words):
            graft.load(bert(), tmp_path)


def test_pickles_are_never_read(tmp_path):
    model = bert()
    adapters.init(model)
    model.add_adapter("mine", config="seq_bn")
    model.save_adapter(tmp_path, "mine", use_safetensors=False)
    with pytest.raises(GraftError, match=r"pytorch_adapter\.bin is a pickle"):
        graft.load(bert(), tmp_path)


UNWRITTEN = {
    "a method it lacks": (lambda: graft.attach(bert(), "oft", block=4), "no format for oft"),
    "a place it lacks": (lambda: graft.attach(llama(), "lora", "o_proj"), "no lora at .*o_proj"),
    "one place of two": (lambda: graft.attach(bert(), "houlsby", "attention"), "not at one alone"),
    "blocks that differ": (
        lambda: graft.attach(bert(), "lora", [r"layer\.0\..*query", r"layer\.1\..*key"]),
        "the same modules in all blocks",
    ),
    "ranks that differ": (lambda: graft.attach(bert(), "lora", "qv", rank={"query": 2, "*": 3}), "one r for all"),
    "another model": (lambda: graft.attach(nn.Sequential(nn.Linear(2, 2)), "lora", "0"), "is known for bert"),
    "scaled inputs": (lambda: graft.attach(bert(), "ia3", "key", on="input"), "outputs only"),
    "magnitudes with a bias": (lambda: graft.attach(bert(), "dora", "qv"), "bias"),
}


@pytest.mark.parametrize("make, words", UNWRITTEN.values(), ids=UNWRITTEN)
def test_what_the_library_computes_otherwise_is_not_written(tmp_path, make, words):
    with pytest.raises(GraftError, match=words):
        make().save(tmp_path / "a", format="adapters")
    assert not list(tmp_path.iterdir())
