"""TeRA: the dense Tucker tensor, a high rank from few vectors, and a file without random tensors."""

import copy

import pytest
import torch
from one_layer import acts_as_its_weight, adapted, linear
from safetensors.torch import load_file
from torch import nn

import graft
from models import move


def attached(rank=5, **kw):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 30), nn.Linear(30, 12)).double()
    return model, move(graft.attach(model, graft.TeRA(rank=rank), r"\d", **kw))


def test_is_the_tucker_tensor_at_every_size():
    model, adapter = attached()
    G = adapter.shared.G.view(5, 5, 5, 5)
    for path, (m1, m2), (n1, n2) in (("0", (5, 6), (4, 6)), ("1", (3, 4), (5, 6))):
        d, s, layer = adapter.deltas[path], adapter.shared, model[int(path)]
        factors = s.A1[:m1] * d.D1, s.A2[:m2] * d.D2, s.B1[:n1] * d.E1, s.B2[:n2] * d.E2
        change = torch.einsum("abcd,ia,jb,kc,ld->ijkl", G, *factors).reshape(m1 * m2, n1 * n2) / (n1 * n2) ** 0.5
        x = torch.randn(7, n1 * n2, dtype=torch.float64)
        torch.testing.assert_close(layer(x), x @ (layer.weight + change).T + layer.bias)


@pytest.mark.parametrize("tokens", [1, 300])
@pytest.mark.parametrize("d_in, d_out", [(24, 30), (30, 12), (7, 20)])
def test_few_and_many_tokens_meet_the_same_weight(tokens, d_in, d_out):
    acts_as_its_weight(*adapted(linear(d_in, d_out), graft.TeRA(rank=5)), tokens)


def test_few_vectors_give_a_change_of_full_rank():
    model, adapter = attached(rank=6)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == 2 * 4 * 6  # less than a LoRA of rank 1 at one of the two
    for delta, full in ((adapter.deltas["0"], 24), (adapter.deltas["1"], 12)):
        zero = torch.zeros(delta.site.d_out, delta.site.d_in, dtype=torch.float64)
        assert torch.linalg.matrix_rank(delta.weight(zero)) == full


def test_the_file_holds_the_vectors_alone_and_the_seed_gives_the_rest(tmp_path):
    model, adapter = attached(seed=7)
    adapter.save(tmp_path / "a")
    saved = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert {k: v.numel() for k, v in saved.items()} == {f"{i}:{n}": 5 for i in "01" for n in ("D1", "D2", "E1", "E2")}
    x = torch.randn(3, 24, dtype=torch.float64)
    adapted = model(x)
    again = copy.deepcopy(model)
    graft.adapters(again)["default"].detach()
    graft.load(again, tmp_path / "a", trainable=True)
    assert torch.equal(again(x), adapted)


def test_one_rank_for_all():
    model = nn.Sequential(nn.Linear(5, 9), nn.Linear(9, 3))
    with pytest.raises(graft.GraftError, match=r"rank must be the same at all sites.* 1 asks for 8"):
        graft.attach(model, graft.TeRA(rank={"0": 4, "1": 8}), r"\d")
