"""Top blocks that begin anew (Revisiting Few-sample BERT Fine-tuning), and adapters that begin pre-trained (PVP)."""

import pytest
import torch
from torch import nn

import graft
from models import bert, llama, move, picture, tokens


def test_the_top_blocks_forget_and_the_others_stay():
    model = bert(num_hidden_layers=4, hidden_size=64, intermediate_size=96)
    before, y = picture(model), model(tokens()).logits
    adapter = graft.attach(model, graft.Full(anew=0.02), ["blocks[-2:]", "pooler"], seed=3)
    assert list(adapter.deltas) == ["bert.encoder.layer.2", "bert.encoder.layer.3", "bert.pooler"]
    for delta in adapter.deltas.values():
        for name, m in delta.copy.named_modules():
            if isinstance(m, nn.Linear):
                assert m.weight.std().item() == pytest.approx(0.02, rel=0.1), name
                assert abs(m.weight.mean().item()) < 2e-3 and not m.bias.any()
            elif isinstance(m, nn.LayerNorm):
                assert (m.weight == 1).all() and not m.bias.any()
    assert not torch.allclose(model(tokens()).logits, y)
    again = bert(num_hidden_layers=4, hidden_size=64, intermediate_size=96)
    graft.attach(again, graft.Full(anew=0.02), ["blocks[-2:]", "pooler"], seed=3)
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)  # the same for the same seed
    adapter.detach()
    assert picture(model) == before


def test_some_begin_anew_beside_others_that_do_not(tmp_path):
    model = bert()
    adapter = graft.attach(model, graft.Full(anew={r"layer\.1": 0.02, "*": None}), "blocks")
    kept, new = (adapter.deltas[f"bert.encoder.layer.{i}"] for i in (0, 1))
    base = dict(bert().named_parameters())
    close = lambda d: [torch.equal(p, base[f"{d.site.path}.{n}"]) for n, p in d.copy.named_parameters()]
    assert all(close(kept)) and not any(v for v, (n, p) in zip(close(new), new.copy.named_parameters()) if p.dim() > 1)
    y = model(tokens()).logits
    adapter.save(tmp_path / "adapter")
    again = bert()
    graft.load(again, tmp_path / "adapter")
    assert torch.equal(again(tokens()).logits, y)


def test_norms_that_keep_their_gain_less_one_begin_with_a_gain_of_one():
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

    model = nn.Sequential(GemmaRMSNorm(8))
    with torch.no_grad():
        model[0].weight.fill_(0.7)
    adapter = graft.attach(model, graft.Full(anew=0.02), "0")
    assert not adapter.deltas["0"].copy.weight.any()


@pytest.mark.parametrize(
    ("targets", "layers"),
    [("blocks[-1:]", [3]), ("blocks[:2]", [0, 1]), ("blocks[1:-1]", [1, 2]), ("blocks[:]", [0, 1, 2, 3])],
)
def test_a_part_of_a_preset_is_a_slice_of_it(targets, layers):
    model = llama(layers=4)
    adapter = graft.attach(model, "full", targets)
    assert list(adapter.deltas) == [f"model.layers.{i}" for i in layers]


def test_an_empty_part_is_refused():
    with pytest.raises(graft.GraftError, match=r"'blocks\[7:\]' is empty: .* has 2 there"):
        graft.attach(llama(), "full", "blocks[7:]")


@pytest.mark.parametrize("method", [graft.LoRA(rank=2), graft.Pfeiffer(size=4), graft.PrefixTuning(length=3)])
def test_an_adapter_of_another_task_begins_where_it_was_with_a_new_head(method, tmp_path):
    source = bert(labels=5)
    pretrained = move(graft.attach(source, method, heads=["classifier"]))
    pretrained.task = {"objective": "classification"}
    pretrained.save(tmp_path / "pretrained")
    target = bert(labels=2)
    head = target.classifier.weight.detach().clone()
    adapter = graft.load(target, tmp_path / "pretrained", trainable=True, heads=["classifier"])
    for key, value in pretrained.state_dict().items():
        if not key.startswith("classifier:"):
            assert torch.equal(adapter.state_dict()[key], value)
    assert torch.equal(adapter.deltas["classifier"].copy.weight, head)
    assert adapter.task == {} and all(p.requires_grad for p in adapter.parameters())
    assert target(tokens()).logits.shape == (3, 2)
    with torch.no_grad():
        hidden = source.bert(tokens()).pooler_output
        torch.testing.assert_close(target.bert(tokens()).pooler_output, hidden)
        torch.testing.assert_close(target(tokens()).logits, nn.functional.linear(hidden, head, target.classifier.bias))
    adapter.save(tmp_path / "learnt")
    adapter.detach()
    bare = graft.load(target, tmp_path / "pretrained", heads=())
    assert not bare.heads
