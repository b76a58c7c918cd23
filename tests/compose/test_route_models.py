"""Rows of one batch on models of many makes: encoders, decoders, both, images, mixtures of experts, half precision."""

import inspect

import pytest
import torch
import transformers

import graft
from models import attach, gpt2, llama, tokens

SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=50)
MLP, PLACES = dict(intermediate_size=48), dict(max_position_embeddings=64)
MAKES = {
    "roberta": lambda: transformers.RobertaForSequenceClassification(
        transformers.RobertaConfig(**SIZES, **MLP, **PLACES)
    ),
    "bert": lambda: transformers.BertForTokenClassification(transformers.BertConfig(**SIZES, **MLP, **PLACES)),
    "distilbert": lambda: transformers.DistilBertForSequenceClassification(
        transformers.DistilBertConfig(dim=32, n_layers=2, hidden_dim=48, n_heads=4, vocab_size=50, **PLACES)
    ),
    "opt": lambda: transformers.OPTForCausalLM(
        transformers.OPTConfig(**SIZES, **PLACES, ffn_dim=48, word_embed_proj_dim=32)
    ),
    "neox": lambda: transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SIZES, **MLP)),
    "gpt2": gpt2,
    "bloom": lambda: transformers.BloomForCausalLM(
        transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=50)
    ),
}
# BLOOM itself gives NaN for padding on the left in float64.
DTYPES = dict.fromkeys(MAKES, torch.float64) | {"bloom": torch.float32}


def made(make, dtype=torch.float64):
    torch.manual_seed(0)
    return make().to(dtype).eval()


def only(model, names):
    graft.activate(model, *([names] if names else []))


@pytest.mark.parametrize("name", MAKES)
@pytest.mark.parametrize("padding", ["left", "right", "none"])
@torch.no_grad()
def test_prompts_of_different_lengths_keep_the_positions_of_the_tokens(name, padding):
    model = made(MAKES[name], DTYPES[name])
    for i, length in enumerate((1, 4, 2)):
        attach(model, "prompt_tuning", f"prompt{i}", seed=i, length=length)
    attach(model, "lora", "lora", seed=3)
    rows, x = ["prompt0", "prompt1", None, "lora", "prompt2"], tokens(5, 6, vocabulary=46) + 3
    mask = torch.ones_like(x)
    if padding != "none":
        mask[0, slice(2) if padding == "left" else slice(4, None)] = 0
    given = {} if padding == "none" else {"attention_mask": mask}
    if name == "distilbert" and "position_ids" not in inspect.signature(type(model.distilbert).forward).parameters:
        with pytest.raises(graft.GraftError, match="DistilBertModel does not here"):
            model(input_ids=x, adapters=rows, **given)
        return
    together = model(input_ids=x, adapters=rows, **given).logits
    for i, names in enumerate(rows):
        only(model, names)
        single = model(input_ids=x[i : i + 1], **{k: v[i : i + 1] for k, v in given.items()}).logits[0]
        real = mask[i].bool() if together.dim() == 3 else slice(None)
        torch.testing.assert_close(together[i][real], single[real])


@pytest.mark.parametrize("how", [{}, dict(num_beams=3)], ids=str)
@torch.no_grad()
def test_an_encoder_and_a_decoder(how):
    config = transformers.T5Config(
        vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0, pad_token_id=0
    )
    model = made(lambda: transformers.T5ForConditionalGeneration(config))
    for i, length in enumerate((3, 1)):
        attach(model, "prompt_tuning", f"prompt{i}", seed=i, length=length)
    for i, method in enumerate(("lora", "dora", "ia3")):
        attach(model, method, method, seed=i)
    rows, x = ["prompt0", "lora", "prompt1", None, "dora", "ia3"], tokens(6, 7, vocabulary=48) + 1
    mask, begun = torch.ones_like(x), tokens(6, 4)
    mask[2, 5:] = 0
    together = model(input_ids=x, attention_mask=mask, decoder_input_ids=begun, adapters=rows).logits
    unmasked = model(input_ids=x, decoder_input_ids=begun, adapters=rows).logits
    length = dict(max_new_tokens=5, min_new_tokens=5)
    written = model.generate(x, attention_mask=mask, adapters=rows, **length, **how)
    for i, names in enumerate(rows):
        only(model, names)
        row = slice(i, i + 1)
        own = dict(input_ids=x[row], decoder_input_ids=begun[row])
        torch.testing.assert_close(together[row], model(attention_mask=mask[row], **own).logits)
        torch.testing.assert_close(unmasked[row], model(**own).logits)
        assert torch.equal(written[row], model.generate(x[row], attention_mask=mask[row], **length, **how))


def test_images():
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=8, patch_size=4, num_labels=3, **MLP
    )
    model = made(lambda: transformers.ViTForImageClassification(config))
    methods = ["lora", "dora", "houlsby", "oft", "shira"]
    for i, method in enumerate(methods):
        attach(model, method, method, targets="all-linear" if method != "houlsby" else None, seed=i)
    rows, x = [*methods, None], torch.randn(6, 3, 8, 8).double()
    together = model(pixel_values=x, adapters=rows).logits
    for i, names in enumerate(rows):
        only(model, names)
        torch.testing.assert_close(together[i], model(pixel_values=x[i : i + 1]).logits[0])


def test_a_mixture_of_experts_is_served_around_its_experts():
    config = transformers.MixtralConfig(num_key_value_heads=2, num_local_experts=3, **SIZES, **MLP)
    model = made(lambda: transformers.MixtralForCausalLM(config), torch.float32)
    for i in range(2):
        attach(model, "lora", f"a{i}", seed=i, targets="attention")
    rows, x = ["a1", None, "a0"], tokens(3)
    together = model(input_ids=x, adapters=rows).logits
    for i, names in enumerate(rows):
        only(model, names)
        torch.testing.assert_close(together[i], model(input_ids=x[i : i + 1]).logits[0], rtol=1e-4, atol=1e-5)


class Experts(torch.nn.Module):
    """As mixtures of experts are written with one module an expert: each gets the tokens that chose it."""

    def __init__(self):
        super().__init__()
        self.experts = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(2))

    def forward(self, x):
        flat = x.flatten(0, 1)
        chosen = (flat.sum(-1) > 0).long()
        out = torch.empty_like(flat)
        for i, expert in enumerate(self.experts):
            out[chosen == i] = expert(flat[chosen == i])
        return out.view(x.shape)


def test_experts_that_get_tokens_of_several_rows_are_refused():
    model = Experts()
    for name in "ab":
        graft.attach(model, "lora", r"experts\.\d", name=name, rank=2)
    with pytest.raises(graft.GraftError, match=r"experts\.\d is an expert"), graft.route(model, ["a", "b", None]):
        model(torch.randn(3, 4, 4))
    with graft.route(model, ["b"] * 3):  # one adapter for all rows is no matter of rows
        model(torch.randn(3, 4, 4))


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision(autocast):
    model = llama(torch.float32 if autocast else torch.bfloat16)
    names = ["lora", "dora", "ia3", "oft", "houlsby", "prompt_tuning", "prefix_tuning", "llama_adapter", "vera", "loha"]
    for i, method in enumerate(names):
        attach(model, method, method, seed=i)
    x = tokens(len(names))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        together = model(input_ids=x, adapters=names).logits
        together.float().sum().backward()
        for i, method in enumerate(names):
            only(model, method)
            single = model(input_ids=x[i : i + 1]).logits[0]
            assert single.dtype == together.dtype
            torch.testing.assert_close(together[i].float(), single.float(), rtol=0.1, atol=0.06)
    for adapter in graft.adapters(model).values():
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in adapter.parameters())
