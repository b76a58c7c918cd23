"""SPAFIT, a chain whose methods have a depth each: nothing below, then biases, then biases and low-rank updates."""

import torch

import graft
from models import bert, tokens


def test_only_what_the_depth_is_given_changes(tmp_path):
    model = bert(num_hidden_layers=4)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    graft.attach(model, "bitfit", ["all-linear in blocks[1:]", "norms in blocks[1:]"], name="biases")
    graft.attach(model, graft.LoRA(rank=2), "qv in blocks[2:]", name="updates", heads=["classifier"])
    reached = []
    for block in model.bert.encoder.layer:
        block.register_forward_hook(lambda _, args, out: reached.append(out[0] if type(out) is tuple else out))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.5)
    for step in range(2):  # B of a low-rank update is zero in the first
        model(tokens(seed=step), labels=torch.tensor([0, 1, 2])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert [out.requires_grad for out in reached[:4]] == [False, True, True, True]  # no backward through the lowest
    merged = graft.merged_state_dict(model)
    changed = {k for k, v in merged.items() if not torch.equal(v, before[k])}
    layers = [{k.partition(f"layer.{i}.")[2] for k in changed if f"layer.{i}." in k} for i in range(4)]
    biases = {k.partition("layer.0.")[2] for k in before if "layer.0." in k and k.endswith("bias")}
    key = {"attention.self.key.bias"}  # moves all scores of a query alike: softmax does not see it
    updates = {f"attention.self.{n}.weight" for n in ("query", "value")}
    assert not layers[0] and layers[1] | key == biases | key
    assert layers[2] | key == layers[3] | key == biases | updates | key
    assert {k for k in changed if "layer." not in k} == {"classifier.weight", "classifier.bias"}

    graft.save(model, tmp_path / "chain")
    again = bert(num_hidden_layers=4)
    graft.load(again, tmp_path / "chain")
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)
