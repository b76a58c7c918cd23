"""Skip Tuning, its part about weights: both towers of CLIP are trained whole from a block on, and nothing below runs
backward."""

import copy

import torch

import graft
from models import tokens


def test_the_upper_blocks_of_both_towers_learn_as_in_full_fine_tuning():
    from transformers import CLIPConfig, CLIPModel

    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
    text = sizes | dict(vocab_size=50, max_position_embeddings=16, bos_token_id=0, eos_token_id=49)
    torch.manual_seed(0)
    model = CLIPModel(
        CLIPConfig(text_config=text, vision_config=sizes | dict(image_size=16, patch_size=8), projection_dim=24)
    ).eval()
    plain = copy.deepcopy(model).requires_grad_(False)
    above = ["text_model.final_layer_norm", "vision_model.post_layernorm", "text_projection", "visual_projection"]
    above += [f"{tower}.encoder.layers.{i}" for tower in ("text_model", "vision_model") for i in (1, 2)]
    for path in above:
        plain.get_submodule(path).requires_grad_(True)
    targets = [r"layers\.[12]", "final_layer_norm", "post_layernorm", "text_projection", "visual_projection"]
    adapter = graft.attach(model, "full", targets)
    assert {*adapter.deltas} == {*above}

    below = []
    for tower in (model.text_model, model.vision_model):
        tower.encoder.layers[0].register_forward_hook(lambda _, args, out: below.append(out))
    batch = dict(input_ids=tokens(), pixel_values=torch.randn(3, 3, 16, 16), return_loss=True)
    model(**batch).loss.backward()
    plain(**batch).loss.backward()
    outputs = [out[0] if isinstance(out, tuple) else out for out in below]
    assert len(outputs) == 2 and not any(out.requires_grad for out in outputs)
    for path, delta in adapter.deltas.items():
        wanted = dict(plain.get_submodule(path).named_parameters())
        for name, p in delta.copy.named_parameters():
            torch.testing.assert_close(p.grad, wanted[name].grad)
