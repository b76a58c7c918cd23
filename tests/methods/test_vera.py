"""VeRA against PEFT, and what its sites share."""

import pytest
import torch
from against_peft import both, fill, same
from peft import VeraConfig
from torch import nn

import graft


@pytest.mark.parametrize("bias", [False, True])
def test_is_pefts_vera(bias):
    torch.manual_seed(0)
    host, x = nn.Linear(8, 12, bias=bias), torch.randn(3, 5, 8, dtype=torch.float64)
    ours, delta, layer = both(host, graft.VeRA(rank=6), VeraConfig(r=6))
    with torch.no_grad():
        for mine, other in ((delta.shared.A, layer.vera_A["default"]), (delta.shared.B, layer.vera_B["default"])):
            assert mine.shape == other.shape
            torch.testing.assert_close(mine.std(), other.std(), rtol=0.3, atol=0)  # the same distribution
            assert mine.abs().max() < 1.05 * (6 / mine.shape[1]) ** 0.5
            other.copy_(mine)
    assert torch.equal(delta.d, layer.vera_lambda_d["default"])
    pairs = [(delta.d, layer.vera_lambda_d["default"]), (delta.b, layer.vera_lambda_b["default"])]
    fill(pairs)
    same(ours, layer, pairs, x)


def test_is_the_dense_formula_at_every_size():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 9), nn.Linear(9, 3)).double()
    adapter = graft.attach(model, graft.VeRA(rank=4), r"\d")
    for path, module in (("0", model[0]), ("1", model[1])):
        delta = adapter.deltas[path]
        with torch.no_grad():
            delta.b.normal_()
            delta.d.normal_()
        A, B = adapter.shared.A[:, : module.in_features], adapter.shared.B[: module.out_features]
        x = torch.randn(7, module.in_features, dtype=torch.float64)
        dense = module.weight + torch.diag(delta.b) @ B @ torch.diag(delta.d) @ A
        torch.testing.assert_close(module(x), x @ dense.T + module.bias)


def test_sites_share_one_frozen_pair():
    model = nn.Sequential(nn.Linear(5, 9), nn.Linear(9, 3))
    adapter = graft.attach(model, graft.VeRA(rank=4), r"\d")
    assert {d.shared for d in adapter.deltas.values()} == {adapter.shared}
    assert adapter.shared.A.shape == (4, 9) and adapter.shared.B.shape == (9, 4)
    assert not list(adapter.shared.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == 2 * 4 + 9 + 3  # d and b of both sites


def test_projection_may_be_left_out_of_the_file_and_drawn_again():
    def make(seed, **kw):
        return graft.attach(nn.Sequential(nn.Linear(5, 9)), graft.VeRA(rank=4, **kw), "0", seed=seed)

    full, light = make(1, save_projection=True), make(1)
    assert {"*:A", "*:B"} == full.state_dict().keys() - light.state_dict().keys()
    assert torch.equal(full.shared.A, light.shared.A) and torch.equal(full.shared.B, light.shared.B)
    assert not torch.equal(light.shared.A, make(2).shared.A)


def test_one_rank_for_all():
    model = nn.Sequential(nn.Linear(5, 9), nn.Linear(9, 3))
    with pytest.raises(graft.GraftError, match=r"rank must be the same at all sites.* 1 asks for 8"):
        graft.attach(model, graft.VeRA(rank={"0": 4, "1": 8}), r"\d")


def test_the_same_numbers_come_back_from_a_file_whatever_torchs_generator_holds(tmp_path):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 9))
    adapter = graft.attach(model, graft.VeRA(rank=4), "0", seed=11)
    adapter.save(tmp_path / "a")
    A, B = adapter.shared.A.clone(), adapter.shared.B.clone()
    adapter.detach()
    torch.manual_seed(4)
    again = graft.load(model, tmp_path / "a").shared
    assert torch.equal(again.A, A) and torch.equal(again.B, B)
