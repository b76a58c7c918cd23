import re
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from graft.core.errors import GraftError
from graft.core.targets import PRESETS, resolve

transformers = pytest.importorskip("transformers")
from transformers.pytorch_utils import Conv1D  # noqa: E402

V5 = int(transformers.__version__.split(".")[0]) >= 5
# fmt: off
TEXT = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64, pad_token_id=0,
    bos_token_id=1, eos_token_id=2, attn_implementation="eager",
)
GROUPED = dict(TEXT, num_key_value_heads=2, head_dim=8)
GPT = dict(
    n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=32, bos_token_id=1, eos_token_id=2, pad_token_id=0
)
SEQ2SEQ = dict(
    d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, vocab_size=64,
    encoder_ffn_dim=48, decoder_ffn_dim=48, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
)
EXPERTS = dict(GROUPED, num_local_experts=4, num_experts=4, moe_intermediate_size=16, num_experts_per_tok=2)
IMAGE = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8
)
SHORT = {k: v for k, v in TEXT.items() if k != "attn_implementation"}


def old_new(old, new):
    return new if V5 else old


LLAMA = {
    "LlamaModel": (),
    "LlamaForCausalLM": ("lm_head",),
    "LlamaForSequenceClassification": ("score",),
    "LlamaForTokenClassification": ("score",),
}
# configuration; model classes with their heads; stacks; per block: q and v projections, the attention's and the MLP's
# matrices; names of what owns the projections, and of what ends the sub-blocks of attention and MLP
LINEAR4, MLP3 = "q_proj k_proj v_proj o_proj", "gate_proj up_proj down_proj"
BERT_ATTENTION = "self.query self.key self.value output.dense"
BERT_MLP = "intermediate.dense output.dense"
ARCHITECTURES = {
    "Llama": (GROUPED, LLAMA, "layers", "q_proj v_proj", LINEAR4, MLP3, "self_attn", "self_attn", "mlp"),
    "Mistral": (GROUPED, {"MistralForCausalLM": ("lm_head",)}, "layers", "q_proj v_proj", LINEAR4, MLP3, "self_attn",
        "self_attn", "mlp"),
    "Qwen2": (GROUPED, {"Qwen2Model": (), "Qwen2ForCausalLM": ("lm_head",)}, "layers", "q_proj v_proj", LINEAR4, MLP3,
        "self_attn", "self_attn", "mlp"),
    "Qwen3": (GROUPED, {"Qwen3ForCausalLM": ("lm_head",)}, "layers", "q_proj v_proj", LINEAR4, MLP3, "self_attn",
        "self_attn", "mlp"),
    "Gemma2": (GROUPED, {"Gemma2ForCausalLM": ("lm_head",)}, "layers", "q_proj v_proj", LINEAR4, MLP3, "self_attn",
        "self_attn", "mlp"),
    "Gemma3Text": (GROUPED, {"Gemma3TextModel": (), "Gemma3ForCausalLM": ("lm_head",)}, "layers", "q_proj v_proj",
        LINEAR4, MLP3, "self_attn", "self_attn", "mlp"),
    "Phi3": (GROUPED, {"Phi3ForCausalLM": ("lm_head",)}, "layers", "qkv_proj", "o_proj qkv_proj",
        "gate_up_proj down_proj", "self_attn", "self_attn", "mlp"),
    "GPT2": (GPT, {"GPT2Model": (), "GPT2LMHeadModel": ("lm_head",), "GPT2ForSequenceClassification": ("score",)},
        "h", "c_attn", "c_attn c_proj", "c_fc c_proj", "attn", "attn", "mlp"),
    "GPTNeoX": (TEXT, {"GPTNeoXForCausalLM": ("lm_head", "embed_out")}, "layers", "query_key_value",
        "query_key_value dense", "dense_h_to_4h dense_4h_to_h", "attention", "attention", "mlp"),
    "Falcon": (SHORT, {"FalconForCausalLM": ("lm_head",)}, "h", "query_key_value", "query_key_value dense",
        "dense_h_to_4h dense_4h_to_h", "self_attention", "self_attention", "mlp"),
    "Bloom": (SHORT, {"BloomForCausalLM": ("lm_head",)}, "h", "query_key_value", "query_key_value dense",
        "dense_h_to_4h dense_4h_to_h", "self_attention", "dense", "dense_4h_to_h"),
    "OPT": (dict(TEXT, ffn_dim=48, word_embed_proj_dim=16, max_position_embeddings=32),
        {"OPTForCausalLM": ("lm_head",)}, "layers", "v_proj q_proj", "k_proj v_proj q_proj out_proj", "fc1 fc2",
        "self_attn", "self_attn", "fc2"),
    "Mixtral": (EXPERTS, {"MixtralForCausalLM": ("lm_head",)}, "layers", "q_proj v_proj", LINEAR4, None, "self_attn",
        "self_attn", old_new("block_sparse_moe", "mlp")),
    "Qwen3Moe": (EXPERTS, {"Qwen3MoeForCausalLM": ("lm_head",)}, "layers", "q_proj v_proj", LINEAR4, None,
        "self_attn", "self_attn", "mlp"),
    "GptOss": (EXPERTS, {"GptOssForCausalLM": ("lm_head",)}, "layers", "q_proj v_proj", LINEAR4, None, "self_attn",
        "self_attn", "mlp"),
    "Bert": (TEXT, {"BertModel": (), "BertForSequenceClassification": ("classifier",), "BertForMaskedLM": ("cls",)},
        "layer", "query value", BERT_ATTENTION, BERT_MLP, "self", "dense", "dense"),
    "Roberta": (TEXT, {"RobertaModel": (), "RobertaForSequenceClassification": ("classifier",),
        "RobertaForMaskedLM": ("lm_head",)}, "layer", "query value", BERT_ATTENTION, BERT_MLP, "self", "dense",
        "dense"),
    "DebertaV2": (SHORT, {"DebertaV2ForSequenceClassification": ("pooler", "classifier")}, "layer",
        "query_proj value_proj", "query_proj key_proj value_proj output.dense", BERT_MLP, "self", "dense", "dense"),
    "DistilBert": (dict(dim=32, hidden_dim=48, n_layers=2, n_heads=4, vocab_size=64), {"DistilBertModel": (),
        "DistilBertForSequenceClassification": ("pre_classifier", "classifier")}, "layer", "q_lin v_lin",
        "q_lin k_lin v_lin out_lin", "lin1 lin2", "attention", "attention", "ffn"),
    "ModernBert": (TEXT, {"ModernBertModel": (), "ModernBertForSequenceClassification": ("head", "classifier"),
        "ModernBertForMaskedLM": ("head", "decoder")}, "layers", "Wqkv", "Wqkv Wo", "Wi Wo", "attn", "attn", "mlp"),
    "Albert": (dict(TEXT, embedding_size=16), {"AlbertModel": (), "AlbertForSequenceClassification": ("classifier",)},
        "albert_layers", "query value", "query key value dense", "ffn ffn_output", "attention", "dense",
        "ffn_output"),
    "ViT": (IMAGE, {"ViTModel": (), "ViTForImageClassification": ("classifier",)}, old_new("layer", "layers"),
        old_new("query value", "q_proj v_proj"), old_new("query key value output.dense", LINEAR4), old_new(BERT_MLP,
        "fc1 fc2"), "attention", "attention", old_new("dense", "mlp")),
    "CLIP": (dict(text_config=SHORT, vision_config=IMAGE), {"CLIPModel": ()}, "layers", "v_proj q_proj",
        "k_proj v_proj q_proj out_proj", "fc1 fc2", "self_attn", "self_attn", "mlp"),
    "Whisper": (dict(SEQ2SEQ, max_source_positions=16, max_target_positions=16, num_mel_bins=8), {"WhisperModel": (),
        "WhisperForConditionalGeneration": ("proj_out",), "WhisperForAudioClassification": ("projector",
        "classifier")}, "layers", "v_proj q_proj", "k_proj v_proj q_proj out_proj", "fc1 fc2",
        "self_attn encoder_attn", "self_attn encoder_attn", "fc2"),
    "T5": (dict(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=64, decoder_start_token_id=0),
        {"T5Model": (), "T5EncoderModel": (), "T5ForConditionalGeneration": ("lm_head",),
        "T5ForSequenceClassification": ("classification_head",)}, "block", "q v", "q k v o", "wi wo",
        "SelfAttention EncDecAttention", "SelfAttention EncDecAttention", "DenseReluDense"),
    "Bart": (dict(SEQ2SEQ, max_position_embeddings=32), {"BartModel": (),
        "BartForConditionalGeneration": ("lm_head",), "BartForSequenceClassification": ("classification_head",)},
        "layers", "v_proj q_proj", "k_proj v_proj q_proj out_proj", "fc1 fc2", "self_attn encoder_attn",
        "self_attn encoder_attn", "fc2"),
    "Swin": (dict(embed_dim=16, depths=[1, 2], num_heads=[2, 2], image_size=16, patch_size=2, window_size=2),
        {"SwinModel": (), "SwinForImageClassification": ("classifier",)}, "blocks", old_new("query value",
        "q_proj v_proj"), old_new("query key value output.dense", LINEAR4), old_new(BERT_MLP, "fc1 fc2"),
        old_new("self", "attention"), "attention", old_new("dense", "mlp")),
}
# fmt: on
MODELS = [(name, cls) for name, entry in ARCHITECTURES.items() for cls in entry[1]]


def build(cls, name=None, **changes):
    if not hasattr(transformers, cls):
        pytest.skip(f"transformers {transformers.__version__} has no {cls}")
    name = name or next(n for n, c in MODELS if c == cls)
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**ARCHITECTURES[name][0], **changes})
    return getattr(transformers, cls)(config).eval()


def paths(model, targets, kinds=("linear",)):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [path for path, _ in resolve(model, targets, kinds)]


def matrices(model, *types):
    return [p for p, m in model.named_modules() if isinstance(m, types or (nn.Linear, Conv1D))]


def under(path, prefixes):
    return any(path == p or path.startswith(f"{p}.") for p in prefixes)


def fused(model):
    """Paths of the modules with the matrices of several experts in one parameter."""
    return [p for p, m in model.named_modules() if type(m).__name__.endswith("Experts")
            and any(x.dim() == 3 for x in m.parameters(recurse=False))]  # fmt: skip


def inputs(model, seed=0):
    torch.manual_seed(seed)
    ids = torch.randint(3, 60, (2, 12))
    name = type(model).__name__
    if name.startswith("Whisper"):
        extra = {} if "Audio" in name else {"decoder_input_ids": ids}
        return {"input_features": torch.randn(2, 8, 32), **extra}
    pixels = torch.randn(2, 3, 16, 16)
    if name.startswith("CLIP"):
        return {"input_ids": ids, "pixel_values": pixels}
    if name.startswith(("ViT", "Swin")):
        return {"pixel_values": pixels}
    if name in ("T5Model", "T5ForConditionalGeneration", "BartForConditionalGeneration"):
        return {"input_ids": ids, "decoder_input_ids": ids}
    if "SequenceClassification" in name:
        ids[:, -1] = model.config.eos_token_id or 2
    return {"input_ids": ids}


def answer(model, seed=0):
    """The outputs of the model as one vector."""
    with torch.no_grad():
        out = model(**inputs(model, seed)).to_tuple()
    return torch.cat([t.flatten() for t in out if isinstance(t, torch.Tensor)])


# Presets on real architectures


@pytest.mark.parametrize("name, cls", MODELS)
def test_all_linear_is_every_matrix_but_the_head(name, cls):
    model = build(cls)
    head = ARCHITECTURES[name][1][cls]
    expected = [p for p in matrices(model) if not under(p, head)]
    assert paths(model, "all-linear") == expected
    convs = [p for p in matrices(model, nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d) if not under(p, head)]
    assert paths(model, "all-linear", ("linear", "conv", "embedding")) == convs
    of_head = [p for p in matrices(model) if under(p, head)]
    if of_head:
        assert paths(model, "head") == of_head
        wholes = [p for p, _ in model.named_children() if p in head]
        assert paths(model, "head", ("module",)) == wholes
    else:
        with pytest.raises(GraftError, match="nothing for the preset 'head'"):
            resolve(model, "head")


@pytest.mark.parametrize("name, cls", MODELS)
def test_blocks_split_into_attention_and_mlp(name, cls):
    """Attention and MLP share no matrix, together are all of a block, and are those of the architecture."""
    model = build(cls)
    _, _, stack, qv, attention, mlp, owner, attention_end, mlp_end = ARCHITECTURES[name]
    blocks = paths(model, "blocks", ("module",))
    assert blocks == [p for p, m in model.named_modules() if re.fullmatch(rf"(.*\.)?{stack}\.\d+(\.\d+)?", p)
                      and not isinstance(m, nn.ModuleList)]  # fmt: skip
    found = paths(model, "attention")
    rest = [] if fused(model) else paths(model, "mlp")
    assert not {*found} & {*rest}
    assert {*found} | {*rest} == {p for p in matrices(model) if under(p, blocks)}
    for block in blocks:
        inside = [p.removeprefix(f"{block}.") for p in paths(model, "attention", ("attention",)) if under(p, [block])]
        assert [p.split(".")[-1] for p in inside] == owner.split()[: len(inside)] and inside
        assert len(inside) == (2 if "decoder" in block and " " in owner else 1)
        copies = len(inside)

        def ends(preset, kinds, block=block):
            return [p.removeprefix(f"{block}.") for p in paths(model, preset, kinds) if under(p, [block])]

        def fit(got, names, copies, where):
            wanted = names.split() * copies
            assert len(got) == len(wanted), where
            assert all(g == w or g.endswith(f".{w}") for g, w in zip(got, wanted)), where

        fit(ends("attention", ("linear",)), attention, copies, block)
        fit(ends("qv", ("linear",)), qv, copies, block)
        if mlp:
            fit(ends("mlp", ("linear",)), mlp, 1, block)
        fit(ends("attention", ("module",)), " ".join(attention_end.split()[:copies]), 1, block)
        fit(ends("mlp", ("module",)), mlp_end, 1, block)


SUB_BLOCKS = [c for n, c in MODELS if c in {next(iter(e[1])) for e in ARCHITECTURES.values()}]


@pytest.mark.parametrize("preset", ["attention", "mlp"])
@pytest.mark.parametrize("cls", SUB_BLOCKS)
def test_ends_of_sub_blocks_carry_all_of_them_and_no_residual(preset, cls):
    """With their outputs at zero, the matrices of the sub-blocks count no more, while the residual still flows."""
    model = build(cls)
    for module in [m for _, m in resolve(model, preset, ("module",))]:
        module.register_forward_hook(
            lambda m, a, out: (torch.zeros_like(out[0]), *out[1:]) if isinstance(out, tuple) else torch.zeros_like(out)
        )
    before = answer(model)
    assert not torch.allclose(before, answer(model, seed=1))
    with torch.no_grad():
        for path in [] if preset == "mlp" and fused(model) else paths(model, preset):
            model.get_submodule(path).weight.normal_()
        for path in fused(model) if preset == "mlp" else []:
            for parameter in model.get_submodule(path).parameters():
                parameter.normal_()
    assert torch.equal(before, answer(model))


@pytest.mark.parametrize("cls", [c for n, c in MODELS if n not in ("Mixtral", "Qwen3Moe")])
def test_every_matrix_of_all_linear_is_called(cls):
    """A module whose weight is read past its forward would not be called: its delta would be bypassed."""
    model = build(cls)
    called = set()
    chosen = paths(model, "all-linear", ("linear", "conv"))
    for path in chosen:
        model.get_submodule(path).register_forward_hook(lambda m, a, out, path=path: called.add(path))
    answer(model)
    assert set(chosen) == called


@pytest.mark.parametrize(
    "cls", ["T5Model", "BartModel", "LlamaForCausalLM", "BertModel", "GPT2Model", "CLIPModel", "OPTForCausalLM"]
)
def test_embeddings_are_the_tables_that_the_token_ids_run_through(cls):
    model = build(cls)
    called = set()
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            module.register_forward_hook(
                lambda m, a, out, path=path: called.add(path) if m.num_embeddings == 64 else None
            )
    answer(model)
    assert set(paths(model, "embeddings", ("embedding",))) == called


def test_norms():
    model = build("ModernBertForSequenceClassification")
    expected = [p for p, m in model.named_modules() if isinstance(m, nn.LayerNorm) and not under(p, ["head"])]
    assert paths(model, "norms", ("norm",)) == expected
    model = build("Qwen3ForCausalLM")
    assert paths(model, "norms", ("norm",)) == [p for p, m in model.named_modules() if "RMSNorm" in type(m).__name__]


# What cannot be adapted


@pytest.mark.parametrize("cls", ["MixtralForCausalLM", "Qwen3MoeForCausalLM", "GptOssForCausalLM"])
def test_experts_in_one_parameter_are_left_out_with_a_warning_and_refused_by_name(cls):
    model = build(cls)
    experts = fused(model)
    if not experts:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert len(resolve(model, "mlp")) == 2 * (1 + 4 * 3)
        pytest.skip("this version keeps a module for every expert")
    with pytest.warns(UserWarning, match=rf"leaves out 2 modules .*{experts[0]} .*3-d") as seen:
        found = resolve(model, "all-linear")
    assert len(seen) == 1 and len(found) == 2 * 4
    for picks in ("experts", r"layers\.1\..*", lambda p, m: "mlp" in p):
        with pytest.raises(TypeError, match=r"layers\.\d\.mlp\.experts .*3-d parameter"):
            resolve(model, picks)
    with pytest.raises(TypeError, match="3-d"):
        resolve(model, "mlp")


def test_mamba_keeps_what_its_mixer_reads_past_forward():
    """The mixer multiplies by dt_proj.weight itself: a delta on dt_proj would have no effect."""
    torch.manual_seed(0)
    model = transformers.MambaForCausalLM(
        transformers.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=64, state_size=4)
    ).eval()
    called = set()
    for path, module in model.named_modules():
        module.register_forward_hook(lambda m, a, out, path=path: called.add(path))
    answer(model)
    assert not V5 or "backbone.layers.0.mixer.dt_proj" not in called  # before, so on the fast path alone
    with pytest.warns(UserWarning, match="bypassed"):
        assert {p for p, _ in resolve(model, "all-linear", ("linear", "conv"))} <= called
    assert paths(model, "all-linear") == [f"backbone.layers.{i}.mixer.in_proj" for i in range(2)]
    with pytest.raises(TypeError, match=r"layers\.0\.mixer\.dt_proj is read directly by its MambaMixer"):
        resolve(model, "dt_proj")
    with pytest.raises(GraftError, match="nothing for the preset 'mlp'"):
        resolve(model, "mlp")


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.attend = nn.MultiheadAttention(16, 2, batch_first=True)
        self.out = nn.Linear(16, 16)

    def forward(self, x):
        return self.out(self.attend(x, x, x)[0])


def test_multihead_attention_is_refused_by_name():
    model = Attending()
    with pytest.raises(TypeError, match=r"attend\.out_proj is read directly by its MultiheadAttention.*bypassed"):
        resolve(model, "out_proj")
    with pytest.raises(TypeError, match=r"attend\.out_proj"):
        resolve(model, lambda p, m: isinstance(m, nn.Linear))
    assert paths(model, "all-linear") == ["out"]
    assert paths(model, "attend", ("module",)) == ["attend"]


def test_fast_path_of_torch_layers():
    """In evaluation with a frozen base, torch's layer with batch_first reads its children's weights in one kernel."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval().requires_grad_(False)
    calls = []
    layer.linear1.register_module("probe", nn.Identity())
    plain, layer.linear1.__class__ = (
        nn.Linear.forward,
        type("Probed", (nn.Linear,), {"forward": lambda self, x: calls.append(1) or plain(self, x)}),
    )
    x = torch.randn(1, 3, 16)
    layer(x)
    assert not calls
    with pytest.raises(TypeError, match=r"linear1 is read directly.*set_fastpath_enabled\(False\)"):
        resolve(layer, "linear1")
    enabled = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        layer(x)
        assert calls and paths(layer, "linear.") == ["linear1", "linear2"]
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
    assert paths(nn.TransformerEncoderLayer(16, 2, 32), "mlp") == ["linear1", "linear2"]


# Plain modules


class Block(nn.Module):
    def __init__(self, d=8):
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(d), nn.Linear(d, d)

    def forward(self, x):
        return x + self.fc(self.norm(x))


class Plain(nn.Module):
    def __init__(self, d=8):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(10, d), nn.Embedding(4, d)
        self.stem = nn.Linear(d, d)
        self.body = nn.ModuleList([Block(d) for _ in range(3)])
        self.final = nn.LayerNorm(d)
        self.answer = nn.Linear(d, 2)


def test_plain_modules():
    model, body = Plain(), [f"body.{i}" for i in range(3)]
    assert paths(model, "all-linear") == ["stem", *(f"{b}.fc" for b in body)]
    assert paths(model, "head") == ["answer"]
    assert paths(model, "blocks", ("module",)) == body
    assert paths(model, "embeddings", ("embedding",)) == ["wte"]
    assert paths(model, "norms", ("norm",)) == [*(f"{b}.norm" for b in body), "final"]
    flat = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    assert paths(flat, "all-linear") == ["0", "2"]
    assert paths(nn.Linear(2, 2), "all-linear") == [""]


def test_kinds():
    model = build("LlamaForCausalLM")
    for name in ("", "model"):
        assert resolve(model, name, ("model",)) == [("", model)]
        assert resolve(model, name, ("module",)) == [("", model)]
        with pytest.raises(TypeError, match=r"the model itself.*linear"):
            resolve(model, name)
    with pytest.raises(TypeError, match=r"'mlp' gives .*gate_proj.*works on norm"):
        resolve(model, "mlp", ("norm",))
    with pytest.raises(TypeError, match=r"'lm_head' picks lm_head, a Linear \(kind linear\); the method works on norm"):
        resolve(model, "lm_head", ("norm",))
    with pytest.raises(TypeError, match="a ModuleList"):
        resolve(model, "layers", ("module",))
    assert paths(model, "self_attn", ("attention",)) == [f"model.layers.{i}.self_attn" for i in range(2)]
    with pytest.raises(TypeError, match="LlamaMLP"):
        resolve(model, "(mlp)", ("attention",))
    # of what a pattern fits, the modules of fitting kinds are taken
    assert paths(model, r"layers\.0\..*") == [p for p in matrices(model) if ".0." in p]


def test_errors_say_what_would_work():
    model = build("LlamaForCausalLM", num_hidden_layers=3)
    near = "no module of LlamaForCausalLM matches 'q_porj'; did you mean 'q_proj' (3 modules)?"
    with pytest.raises(ValueError, match=f"^{re.escape(near)}$"):
        resolve(model, "q_porj")
    with pytest.raises(ValueError, match="the preset 'all-linear'"):
        resolve(model, "all_linear")
    with pytest.raises(ValueError, match="fitting kind are called 'q_proj', "):
        resolve(model, "zzz")
    with pytest.raises(ValueError, match=r"matches the function <lambda>; presets are"):
        resolve(model, lambda p, m: False)
    with pytest.raises(ValueError, match=r"'q_proj\(' is no regular expression: "):
        resolve(model, "q_proj(")
    with pytest.raises(ValueError, match="no regular expression"):
        resolve(model, "a)|(b")
    with pytest.raises(ValueError, match="no targets are given"):
        resolve(model, [])
    with pytest.raises(ValueError, match="'q_porj'"):  # each member of a list must fit
        resolve(model, ["v_proj", "q_porj"])
    for wrong in (3, None, [None]):
        with pytest.raises(TypeError, match=r"not (3|None)"):
            resolve(model, wrong)
    for name in PRESETS:
        try:
            assert resolve(model, name, ("linear", "module", "norm", "embedding", "model"))
        except GraftError as error:
            pytest.fail(str(error))


# Several paths, adapters, unions


def test_a_shared_module_has_one_path_and_answers_to_all():
    model = Plain()
    model.again = model.body[1].fc
    assert paths(model, "again") == ["body.1.fc"]
    assert paths(model, ["again", "fc"]) == [f"body.{i}.fc" for i in range(3)]
    assert paths(model, lambda p, m: p == "again") == ["body.1.fc"]
    model.body[0].loop = model  # a cycle ends
    assert paths(model, "again") == ["body.1.fc"]
    albert = build("AlbertModel", num_hidden_layers=6)
    assert len(resolve(albert, "blocks", ("module",))) == 1 and len(resolve(albert, "qv")) == 2


def test_modules_of_adapters_are_not_seen():
    model, before = Plain(), {}
    kinds = ("linear", "norm", "embedding", "module")
    for preset in ("all-linear", "head", "norms", "embeddings", "blocks"):
        before[preset] = paths(model, preset, kinds)

    class Owned(nn.Module):
        graft_owned = True

        def __init__(self):
            super().__init__()
            self.A, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

    model.body[0].fc.deltas = Owned()
    model.shared_default = nn.ModuleList([Block(), Block()])
    model.shared_default.graft_owned = True
    adapted = type("Block", (Block,), {"host_class": Block})  # a block that carries deltas is one of the stack still
    model.body[1].__class__ = adapted
    for preset, expected in before.items():
        assert paths(model, preset, kinds) == expected
    with pytest.raises(GraftError):
        resolve(model, "A")


names = st.sampled_from(["q", "k", "fc", "mlp", "attn", "proj_1", "0", "1"])
trees = st.recursive(
    st.sampled_from(["linear", "norm", "relu"]), lambda inner: st.dictionaries(names, inner, max_size=4), max_leaves=12
)
patterns = st.sampled_from(
    [
        "q",
        "fc",
        "k|fc",
        r"mlp\.q",
        r"attn\..*",
        ".*",
        "[qk]",
        r"\d",
        r"\d\.(q|fc)",
        "proj_.",
        "^q",
        "q$",
        "(?:mlp|attn)",
    ]
)


def grow(tree, shared=None):
    if tree == "linear":
        return shared or nn.Linear(2, 2)
    if isinstance(tree, str):
        return nn.LayerNorm(2) if tree == "norm" else nn.ReLU()
    module = nn.Module()
    for name, inner in tree.items():
        module.add_module(name, grow(inner, shared))
    return module


@settings(max_examples=150, deadline=None)
@given(trees.filter(lambda t: isinstance(t, dict)), st.lists(patterns, min_size=1, max_size=3), st.booleans())
def test_patterns_fit_whole_paths_or_suffixes(tree, picks, sharing):
    model = grow(tree, nn.Linear(2, 2) if sharing else None)
    every = [(p, m) for p, m in model.named_modules(remove_duplicate=False) if isinstance(m, nn.Linear)]
    first = {}
    for p, m in every:
        first.setdefault(id(m), p)

    def expected(pattern):
        fits = [id(m) for p, m in every if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", p)]
        return [p for key, p in first.items() if key in fits]

    def got(picks):
        try:
            return paths(model, picks)
        except GraftError:
            return []

    singles = [got(p) for p in picks]
    assert singles == [expected(p) for p in picks]
    union = [p for p in first.values() if any(p in s for s in singles)]
    if all(singles):
        assert got(picks) == got(tuple(reversed(picks))) == got(set(picks)) == union
        assert got([*picks, picks[0]]) == union
    else:
        assert got(picks) == []
    assert got(lambda p, m: isinstance(m, nn.Linear)) == list(first.values())


def test_a_part_of_the_blocks_holds_presets_and_patterns_to_a_depth():
    model = build("LlamaForCausalLM", num_hidden_layers=4)
    of = lambda layers, *names: [f"model.layers.{i}.{name}" for i in layers for name in names]
    q, v, down = "self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"
    assert paths(model, "qv in blocks[2:]") == of([2, 3], q, v)
    assert paths(model, "qv in blocks[-3:-1]") == of([1, 2], q, v)
    assert paths(model, ["down_proj in blocks[:1]", "q_proj in blocks[3:]"]) == of([0], down) + of([3], q)
    assert paths(model, r"model\.layers\.[012]\..*[qv]_proj in blocks[1:]") == of([1, 2], q, v)
    assert paths(model, "norms in blocks[3:]", ("norm",)) == of([3], "input_layernorm", "post_attention_layernorm")
    assert paths(model, "qv[:3] in blocks[1:]") == of([1], q)  # the first three are q and v of block 0 and q of block 1
    assert paths(model, "all-linear in blocks[:]") == paths(model, "all-linear")


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("head in blocks[1:]", "'head' picks nothing in blocks[1:]"),
        (r"layers\.0\..* in blocks[1:]", "picks nothing in blocks[1:]"),
        ("qv in blocks[9:]", "'blocks[9:]' is empty: LlamaForCausalLM has 2 there"),
        ("qurey in blocks[1:]", "no module of LlamaForCausalLM matches 'qurey'"),
    ],
)
def test_a_depth_with_nothing_there_is_refused(targets, message):
    with pytest.raises(GraftError, match=re.escape(message)):
        resolve(build("LlamaForCausalLM"), targets)
