"""Every method that PEFT has, both ways. Found by their declarations: a new one is tested without touching this."""

import json

import peft
import pytest
import torch
from peft.utils import PeftType
from safetensors.torch import load_file, save_file
from torch import nn

import graft
from graft import GraftError, methods
from graft.core.delta import METHODS
from graft.core.formats.peft import Peft
from models import gpt2, llama, tokens

methods.load()
IDS = tokens()
EXCHANGED = sorted(name for name, cls in METHODS.items() if isinstance(cls.peft, Peft))
# Hyperparameters for a tiny model where those of `small` have no counterpart in PEFT.
HYPER = {"boft": {"factors": 1}, "shira": {"density": lambda s: 2 * (s.d_in + s.d_out) / (s.d_in * s.d_out)}}


def logits(model, ids=IDS):
    with torch.no_grad():
        y = model(ids) if isinstance(ids, torch.Tensor) else model(**ids)
    y = y if isinstance(y, torch.Tensor) else y.logits
    return (
        y[:, -ids.shape[1] :] if isinstance(ids, torch.Tensor) and y.dim() == 3 else y
    )  # PEFT's prompts have some too


def same(ours, theirs, ids=IDS):
    torch.testing.assert_close(logits(ours, ids), logits(theirs, ids), rtol=1e-5, atol=1e-5)


def disturb(parameters, by=0.3):
    torch.manual_seed(7)
    with torch.no_grad():
        for p in parameters:
            p.add_(by * torch.randn_like(p))


def there(make, folder):
    return peft.PeftModel.from_pretrained(make(), folder).eval()


def own(theirs):
    """The parameters of PEFT's adapter, which it freezes when it loads one."""
    if theirs.active_peft_config.is_prompt_learning:
        return list(theirs.prompt_encoder.parameters())
    prefix = getattr(theirs.base_model, "prefix", "adaption_")
    return [p for n, p in theirs.named_parameters() if prefix in n]


def both_ways(make, folder, recipe, targets=None, ids=IDS, by=0.3):
    """Saved here, loaded there and moved, saved there, loaded here, saved here, loaded there: all tensors random."""
    plain = logits(make(), ids)
    ours = make()
    graft.attach(ours, recipe, targets).save(folder / "start", format="peft")
    theirs = there(make, folder / "start")
    same(ours, theirs, ids)
    disturb(own(theirs), by)
    theirs.save_pretrained(folder / "theirs")
    assert (logits(theirs, ids) - plain).abs().max() > 1e-3
    ours = make()
    adapter = graft.load(ours, folder / "theirs")
    same(ours, theirs, ids)
    adapter.save(folder / "ours", format="peft")
    same(ours, there(make, folder / "ours"), ids)
    again = make()
    graft.load(again, folder / "ours")
    same(again, theirs, ids)
    return adapter


@pytest.mark.parametrize("name", EXCHANGED)
def test_both_ways(name, tmp_path):
    cls = METHODS[name]
    adapter = both_ways(llama, tmp_path, graft.core.recipe.Recipe.of(name, **(cls.small | HYPER.get(name, {}))))
    assert adapter.recipe.method is cls
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert config["peft_type"] == cls.peft.kind


def test_every_type_of_peft_that_is_in_the_catalogue_is_exchanged_or_says_why_not():
    plain = lambda name: name.lower().replace("_", "")
    covered = {cls.peft.kind for cls in METHODS.values() if isinstance(cls.peft, Peft)}
    named = {plain(name): cls for name, cls in METHODS.items()}
    missing = [
        kind.value
        for kind in PeftType
        if kind.value not in covered and plain(kind.value) in named and not named[plain(kind.value)].peft
    ]
    assert not missing


def test_a_method_that_says_why_it_is_not_exchanged_says_it(tmp_path, monkeypatch):
    monkeypatch.setattr(METHODS["full"], "peft", "it saves modules whole")
    with pytest.raises(GraftError, match="PEFT has no format for full \\(it saves modules whole\\)"):
        graft.attach(llama(), "full").save(tmp_path / "a", format="peft")


class Images(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.second = nn.Conv2d(8, 12, 3, groups=2)
        self.third = nn.Conv2d(12, 6, 1)
        self.out = nn.Linear(6, 4)

    def forward(self, x):
        return self.out(self.third(self.second(self.first(x).relu())).mean((2, 3)))


def images():
    torch.manual_seed(0)
    return Images().eval()


def padded():
    model = images()
    model.first.padding_mode = "circular"
    return model


PICTURES = {"x": torch.linspace(-1, 1, 2 * 3 * 9 * 9).view(2, 3, 9, 9).sin()}
CONVOLUTIONS = ["dora", "loha", "lokr", "adalora", "hra", "ia3"]


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name, tmp_path):
    targets = ["first", "third", "out"] + (["second"] if name in ("loha", "lokr", "ia3") else [])
    both_ways(images, tmp_path, graft.core.recipe.Recipe.of(name, **METHODS[name].small), targets, PICTURES)


@pytest.mark.parametrize("name", ["dora", "loha", "lokr", "adalora", "hra"])
def test_convolutions_that_peft_pads_with_zeros_all_the_same_are_refused(name, tmp_path):
    adapter = graft.attach(padded(), name, "first", **METHODS[name].small)
    with pytest.raises(GraftError, match="first, a convolution with"):
        adapter.save(tmp_path / "a", format="peft")
    graft.attach(images(), name, "first", **METHODS[name].small).save(tmp_path / "b", format="peft")
    with pytest.raises(GraftError, match="first, a convolution with"):
        graft.load(padded(), tmp_path / "b")


@pytest.mark.parametrize("name", ["dora", "vera", "adalora", "ia3"])
def test_conv1d_of_gpt2(name, tmp_path):
    recipe = graft.core.recipe.Recipe.of(name, **METHODS[name].small)
    both_ways(gpt2, tmp_path, recipe, ["c_attn", "mlp.c_proj"])


@pytest.mark.parametrize("name", ["loha", "lokr", "oft", "hra", "bone", "miss", "shira"])
def test_hosts_that_peft_cannot_adapt_are_refused(name, tmp_path):
    adapter = graft.attach(gpt2(), name, "c_attn", **(METHODS[name].small | HYPER.get(name, {})))
    with pytest.raises(GraftError, match=r"cannot adapt transformer\.h\.0\.attn\.c_attn, a Conv1D: save it in graft's"):
        adapter.save(tmp_path / "a", format="peft")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("name", EXCHANGED)
def test_a_head_is_saved_along_or_refused(name, tmp_path):
    model, recipe = llama(), graft.core.recipe.Recipe.of(name, **(METHODS[name].small | HYPER.get(name, {})))
    adapter = graft.attach(model, recipe, heads="lm_head")
    disturb(adapter.deltas["lm_head"].parameters())
    try:
        adapter.save(tmp_path / "a", format="peft")
    except GraftError as error:
        assert "stores no heads" in str(error)
    else:
        same(model, there(llama, tmp_path / "a"))
        again = llama()
        graft.load(again, tmp_path / "a")
        same(again, model)


VARIANTS = {
    "lokr, both factors low": (llama, graft.LoKr(rank=1, decompose_both=True)),
    "lokr, a factor": (llama, graft.LoKr(rank=2, factor=4)),
    "lokr, full factors": (llama, graft.LoKr(rank=40)),
    "lokr, ranks by module": (llama, graft.LoKr(rank={"q_proj": 1, "*": 2}, alpha={"v_proj": 3.0, "*": 5.0})),
    "loha, ranks by module": (llama, graft.LoHa(rank={"q_proj": 1, "*": 2})),
    "dora, ranks by module": (llama, graft.DoRA(rank={"q_proj": 1, "*": 2}, rslora=True)),
    "oft, the exact transform": (llama, graft.OFT(block=8)),
    "oft, four terms": (llama, graft.OFT(block=8, terms=4)),
    "bone": (llama, graft.Bone(block=8)),
    "ia3, all outputs": (llama, graft.IA3(on="output")),
    "tokens of a tied embedding": (lambda: llama(tie_word_embeddings=True), graft.Tokens(tokens=(9, 3, 4))),
    "prefix of a network": (llama, graft.PrefixTuning(length=3, reparameterize=True, hidden=5)),
}


@pytest.mark.parametrize("make, recipe", VARIANTS.values(), ids=VARIANTS)
def test_variants(make, recipe, tmp_path):
    both_ways(make, tmp_path, recipe)


def test_the_prefix_of_a_network_is_saved_as_what_it_gives(tmp_path):
    model = llama()
    adapter = graft.attach(model, graft.PrefixTuning(length=3, reparameterize=True, hidden=5))
    disturb(adapter.parameters())
    adapter.save(tmp_path / "a", format="peft")
    same(model, there(llama, tmp_path / "a"))
    other = llama()
    assert graft.load(other, tmp_path / "a").recipe.hyper["reparameterize"] is False
    same(other, model)


THEIRS = {
    "vera, projection not saved": peft.VeraConfig(
        r=5, target_modules=["q_proj", "down_proj"], save_projection=False, projection_prng_key=11
    ),
    "oft, number of blocks": peft.OFTConfig(r=4, oft_block_size=0, target_modules=["q_proj", "down_proj"]),
    "oft, blocks that do not divide": peft.OFTConfig(oft_block_size=5, target_modules=["q_proj"]),
    "oft, three terms": peft.OFTConfig(oft_block_size=4, num_cayley_neumann_terms=3, target_modules=["q_proj"]),
    "oft, exact": peft.OFTConfig(oft_block_size=4, use_cayley_neumann=False, target_modules=["q_proj"]),
    "miss, mini": peft.MissConfig(r=8, mini_r=4, init_weights="mini", target_modules=["q_proj"]),
    "miss, random": peft.MissConfig(r=8, init_weights=False, target_modules=["q_proj"]),
    "miss, cut shard": peft.MissConfig(r=7, target_modules=["q_proj"]),
    "bone": peft.MissConfig(r=8, init_weights="bat", target_modules=["q_proj", "down_proj"]),
    "ia3, a pattern": peft.IA3Config(target_modules=r".*(v_proj|mlp\.\w+_proj)", feedforward_modules=r".*down_proj"),
    "tokens, unsorted": peft.TrainableTokensConfig(target_modules=["embed_tokens"], token_indices=[9, 3, 4]),
    "tokens, a head": peft.TrainableTokensConfig(target_modules=["embed_tokens", "lm_head"], token_indices=[9, 3, 4]),
    "adaption prompt, last layer": peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=1, task_type="CAUSAL_LM"),
    "prefix, a network": peft.PrefixTuningConfig(
        num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=5, task_type="CAUSAL_LM"
    ),
    "dora, embedding": peft.LoraConfig(r=2, use_dora=True, target_modules=["embed_tokens"]),
    "adalora, another penalty": peft.AdaLoraConfig(
        init_r=3, target_r=2, orth_reg_weight=0.2, tinit=2, tfinal=5, total_step=20, target_modules=["q_proj"]
    ),
}


@pytest.mark.parametrize("config", THEIRS.values(), ids=THEIRS)
def test_saved_there_loads_here(config, tmp_path):
    theirs = peft.get_peft_model(llama(), config).eval()
    disturb([p for p in theirs.parameters() if p.requires_grad])
    theirs.save_pretrained(tmp_path)
    ours = llama()
    adapter = graft.load(ours, tmp_path)
    same(ours, theirs)
    if config.peft_type == "ADALORA":
        assert adapter.recipe.hyper["warmup"] == 0.1 and adapter.recipe.hyper["cooldown"] == 0.25


def test_adalora_after_its_budget_was_spent(tmp_path):
    config = peft.AdaLoraConfig(
        init_r=4, target_r=2, tinit=1, tfinal=2, total_step=8, target_modules=["q_proj", "down_proj"]
    )
    theirs = peft.get_peft_model(llama(), config)
    own = [p for p in theirs.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(own, 0.5)
    disturb(own)
    for step in range(1, 8):
        optimizer.zero_grad()
        theirs(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        theirs.base_model.update_and_allocate(step)
    theirs.eval().save_pretrained(tmp_path / "theirs")
    kept = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())["rank_pattern"]
    assert 0 < sum(sum(k) for k in kept.values()) < 16
    ours = llama()
    adapter = graft.load(ours, tmp_path / "theirs")
    same(ours, theirs)
    assert {p: d.keep.bool().tolist() for p, d in adapter.deltas.items()} == {
        k.removesuffix(".lora_E"): v for k, v in kept.items()
    }
    adapter.save(tmp_path / "ours", format="peft")
    same(ours, there(llama, tmp_path / "ours"))


def test_what_was_left_out_of_adalora_here_has_no_effect_there(tmp_path):
    model = llama()
    adapter = graft.attach(model, graft.AdaLoRA(rank=4, target_rank=2))
    disturb(adapter.parameters())
    with torch.no_grad():
        for d in adapter.deltas.values():
            d.keep[1] = 0
    adapter.save(tmp_path / "a", format="peft")
    same(model, there(llama, tmp_path / "a"))


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    return T5ForConditionalGeneration(T5Config(vocab_size=50, **sizes)).eval()


def test_prompts_of_an_encoder_decoder(tmp_path):
    ids = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "decoder_input_ids": IDS[:, :4]}
    both_ways(t5, tmp_path, graft.PromptTuning(length=3), ids=ids, by=1.0)


UNEQUAL = {
    "vera drawn by our seed is saved": (graft.VeRA(rank=3, save_projection=False), None, None),
    "a density that is no rank": (graft.SHiRA(density=0.2), None, "whole r"),
    "gates by head": (graft.LlamaAdapter(length=3), None, "one gate for all heads"),
    "one term": (graft.OFT(block=4, terms=1), None, "one number of terms"),
    "an embedding": (graft.LoHa(rank=2), "embed_tokens", "cannot adapt model.embed_tokens"),
    "tokens of a head alone": (graft.Tokens(tokens=(1, 2)), "lm_head", None),
    "chosen layers": (graft.PrefixTuning(length=2), r"layers\.0\.self_attn", "prefixes in all layers"),
}


@pytest.mark.parametrize("recipe, targets, words", UNEQUAL.values(), ids=UNEQUAL)
def test_what_peft_cannot_hold_is_refused(recipe, targets, words, tmp_path):
    model = llama()
    adapter = graft.attach(model, recipe, targets)
    disturb(adapter.parameters())
    if words:
        with pytest.raises(GraftError, match=words):
            adapter.save(tmp_path / "a", format="peft")
        assert not (tmp_path / "a").exists()
    else:
        adapter.save(tmp_path / "a", format="peft")
        same(model, there(llama, tmp_path / "a"))


def test_learned_positions_have_no_counterpart_of_a_prefix(tmp_path):
    adapter = graft.attach(gpt2(), graft.PrefixTuning(length=2))
    with pytest.raises(GraftError, match="only with plain rotary positions"):
        adapter.save(tmp_path / "a", format="peft")


def test_rows_of_a_tied_head_are_refused_where_only_the_embedding_has_them(tmp_path):
    adapter = graft.attach(llama(tie_word_embeddings=True), graft.Tokens(tokens=(1, 2)), "embed_tokens")
    with pytest.raises(GraftError, match=r"PEFT trains the rows of lm_head with those of model\.embed_tokens"):
        adapter.save(tmp_path / "a", format="peft")


REFUSED = {
    "two gates": (
        peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=1, task_type="CAUSAL_LM"), "adaption_gate", 2.0, "tanh"
    ),
    "gram schmidt": (peft.HRAConfig(r=2, apply_GS=True, target_modules=["q_proj"]), None, 0, "apply_GS"),
    "shared blocks": (peft.OFTConfig(oft_block_size=4, block_share=True, target_modules=["q_proj"]), None, 0, "share"),
    "two terms": (
        peft.OFTConfig(oft_block_size=4, num_cayley_neumann_terms=2, target_modules=["q_proj"]), None, 0, "fewer than 3"
    ),
}  # fmt: skip


@pytest.mark.parametrize("config, tensor, value, words", REFUSED.values(), ids=REFUSED)
def test_what_we_do_not_have_is_refused(config, tensor, value, words, tmp_path):
    theirs = peft.get_peft_model(llama(), config)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if tensor and tensor in name:
                p.fill_(value)
    theirs.save_pretrained(tmp_path)
    model = llama()
    with pytest.raises(GraftError, match=words):
        graft.load(model, tmp_path)
    assert not graft.adapters(model)


def test_there_and_back_gives_the_same_tensors(tmp_path):
    for name, config in THEIRS.items():
        if not name.startswith(("bone", "ia3", "oft, e", "dora", "tokens, a")):
            continue
        theirs = peft.get_peft_model(llama(), config)
        disturb([p for p in theirs.parameters() if p.requires_grad])
        theirs.save_pretrained(tmp_path / name)
        graft.load(llama(), tmp_path / name).save(tmp_path / f"{name} again", format="peft")
        before, after = (load_file(tmp_path / f / "adapter_model.safetensors") for f in (name, f"{name} again"))
        if name.startswith("tokens"):  # the rows are sorted by token here
            before = {k: v[torch.tensor(config.token_indices).argsort()] for k, v in before.items()}
        before = {k: v for k, v in before.items() if "base_layer" not in k}
        assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before), name


@pytest.mark.parametrize("name", EXCHANGED)
def test_damaged_files_load_or_are_refused(name, tmp_path):
    model = llama(layers=1)
    recipe = graft.core.recipe.Recipe.of(name, **(METHODS[name].small | HYPER.get(name, {})))
    graft.attach(model, recipe).save(tmp_path / "a", format="peft")
    file, config_file = tmp_path / "a" / "adapter_model.safetensors", tmp_path / "a" / "adapter_config.json"
    content, config, tensors = file.read_bytes(), json.loads(config_file.read_text()), load_file(file)
    model, tried = llama(layers=1), 0

    def load():
        try:
            graft.load(model, tmp_path / "a").detach()
        except GraftError as error:
            assert "\n" not in str(error)
        assert not graft.adapters(model)

    for key in config.keys() - {"target_modules", "task_type", "base_model_name_or_path"}:
        for junk in ("x", -3, [1, "y"], {"z": None}):
            config_file.write_text(json.dumps(config | {key: junk}))
            load()
            tried += 1
    config_file.write_text(json.dumps(config))
    for key, value in list(tensors.items())[:4]:
        for bad in (value.flatten(), value[:0], value[None].repeat(2, *[1] * value.dim()), value.to(torch.int64)):
            save_file(tensors | {key: bad.contiguous()}, file)
            load()
            tried += 1
    assert tried > 10
    file.write_bytes(content)
    graft.load(model, tmp_path / "a")
