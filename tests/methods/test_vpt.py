"""VPT: against whole blocks that read the prompt beside the tokens, and whose outputs for it are dropped."""

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import ViTConfig, ViTForImageClassification

import graft
from models import bert, move, tokens

P = 3
IMPLEMENTATIONS = ["eager", "sdpa"]


def vit(**config):
    torch.manual_seed(0)
    sizes = dict(
        hidden_size=32, num_hidden_layers=2, intermediate_size=48, num_attention_heads=4, image_size=12, patch_size=4
    )
    return ViTForImageClassification(ViTConfig(**(sizes | config))).eval()


def first(out):
    return out if isinstance(out, torch.Tensor) else out[0]


def read_by_blocks(blocks, prompts, *extended):
    """Each block as the paper runs it: on [tokens; prompt], without the outputs for the prompt."""
    for block, prompt in zip(blocks, prompts):

        def forward(x, *args, block=block, prompt=prompt, **kwargs):
            out = first(type(block).forward(block, torch.cat([x, prompt.expand(len(x), -1, -1)], 1), *extended))
            return out[:, : x.shape[1]]

        block.forward = forward


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_equals_a_vision_transformer_whose_blocks_read_the_prompts(implementation):
    base, x = vit(attn_implementation=implementation), torch.randn(4, 3, 12, 12)
    layers = [m for m in base.modules() if type(m).__name__ == "ViTLayer"]
    drawn = [torch.randn(P, 32) for _ in layers]
    with torch.no_grad():
        for layer in layers:
            layer.layernorm_before.weight.normal_()
        model, plain = copy.deepcopy(base), base(x).logits
        adapter = graft.attach(model, "vpt", length=P)
        for layer, delta, own in zip(layers, adapter.deltas.values(), drawn, strict=True):
            delta.prompt.copy_(layer.layernorm_before(own))
        read_by_blocks(layers, drawn)
        wanted = base(x).logits
        torch.testing.assert_close(model(x).logits, wanted)
    assert (wanted - plain).abs().max() > 1e-3


def test_equals_a_bert_whose_blocks_read_the_prompts_beside_padding():
    model, base, ids = bert(attn_implementation="eager"), bert(attn_implementation="eager"), tokens()
    adapter = move(graft.attach(model, "vpt", length=P))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    hidden = F.pad(mask, (0, P), value=1)[:, None, None].float()
    seen = (1 - hidden) * torch.finfo(torch.float32).min
    with torch.no_grad():
        read_by_blocks(base.bert.encoder.layer, [d.prompt for d in adapter.deltas.values()], seen)
        torch.testing.assert_close(model(ids, mask).logits, base(ids, mask).logits)


def test_a_change_of_the_projections_changes_the_keys_of_the_prompt():
    """K and V are kept in inference until a weight that they come from changes; in training they are made each time."""
    model, x = vit(), torch.randn(4, 3, 12, 12)
    adapter = graft.attach(model, "vpt", length=P)
    with torch.no_grad():
        before = model(x).logits
        inside = dict(next(iter(adapter.deltas.values())).site.module.named_modules())
        inside["v_proj" if "v_proj" in inside else "value"].weight.mul_(10)
        kept = model(x).logits
        torch.testing.assert_close(model.train()(x).logits, kept)
    assert (kept - before).abs().max() > 1e-3
