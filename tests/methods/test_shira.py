"""SHiRA: which entries are trained, and that training them is training these entries of W in place; PEFT's layer."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft_reference import peft_layer
from torch import nn

import graft


def adapted(host, stats=None, **hyper):
    model = nn.Sequential(host)
    return model, graft.attach(model, graft.SHiRA(**hyper), "0", stats=stats).deltas["0"]


def mask_of(delta, w):
    return torch.zeros(w.numel(), dtype=torch.bool).index_fill(0, delta.index, True).view(w.shape)


@settings(max_examples=25, deadline=None)
@given(
    d_in=st.integers(1, 9),
    d_out=st.integers(1, 9),
    density=st.floats(0.01, 1),
    mask=st.sampled_from(["random", "magnitude", "gradient", "snip", "structured"]),
)
def test_trains_the_best_entries(d_in, d_out, density, mask):
    host = nn.Linear(d_in, d_out, dtype=torch.float64)
    w, grad = host.weight.detach(), torch.randn(d_out, d_in, dtype=torch.float64)
    _, delta = adapted(host, {"0": {"weight_grad": grad}}, density=density, mask=mask)
    chosen = mask_of(delta, w)
    keep = max(1, round(density * w.numel()))
    assert len(delta.value) == keep == chosen.sum()
    score = {"magnitude": w.abs(), "gradient": grad.abs(), "snip": (w * grad).abs()}.get(mask)
    if score is not None and keep < w.numel():
        assert score[chosen].min() >= score[~chosen].max()
    if mask == "structured":
        diagonal = min(d_in, d_out)
        assert chosen.diagonal().sum() == min(keep, diagonal)
        beside = chosen.clone().fill_diagonal_(False)
        partial = [row for row in beside if 0 < row.sum() < d_in - 1]
        assert len(partial) <= 1  # whole rows, but for the one where the budget ends


def test_random_entries_differ_between_seeds_and_agree_within_one():
    picks = []
    for seed in (0, 0, 1):
        adapter = graft.attach(nn.Sequential(nn.Linear(30, 30)), graft.SHiRA(density=0.1), "0", seed=seed)
        picks.append(adapter.deltas["0"].index)
    assert torch.equal(picks[0], picks[1]) and not torch.equal(picks[0], picks[2])


def test_a_mask_from_gradients_needs_them():
    with pytest.raises(graft.GraftError, match="mask='snip'\\) needs the statistic weight_grad at 0"):
        adapted(nn.Linear(4, 4), mask="snip")


@pytest.mark.parametrize("host", [nn.Linear(7, 5), nn.Conv2d(2, 4, 3)])
def test_training_is_training_the_entries_in_place(host):
    host = host.double()
    x = torch.randn(6, 7) if isinstance(host, nn.Linear) else torch.randn(2, 2, 5, 5)
    x = x.double()
    full = copy.deepcopy(host)
    model, delta = adapted(host, density=0.3, mask="magnitude")
    chosen = mask_of(delta, host.weight.flatten(1)).view(host.weight.shape)
    ours = torch.optim.Adam([delta.value], 0.1)
    theirs = torch.optim.Adam([full.weight], 0.1)
    for _ in range(3):
        for m, optimizer in ((model, ours), (full, theirs)):
            optimizer.zero_grad()
            m(x).sin().sum().backward()
            if m is full:
                full.weight.grad *= chosen
            optimizer.step()
    torch.testing.assert_close(model(x), full(x))
    merged = graft.merged_state_dict(model)["0.weight"]
    torch.testing.assert_close(merged, full.weight.detach())
    assert torch.equal(merged[~chosen], host.weight[~chosen])


def test_equals_peft():
    peft = pytest.importorskip("peft")
    host = nn.Linear(8, 12).double()
    reference = peft_layer(host, peft.ShiraConfig(r=1, random_seed=0))
    model, delta = adapted(host, density=20 / 96)
    with torch.no_grad():
        delta.value.normal_()
        reference.shira_indices["default"] = torch.stack([delta.index // 8, delta.index % 8])
        reference.shira_weight["default"].copy_(delta.value)
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(model(x), reference(x))


def test_positions_chosen_by_gradients_load_without_them(tmp_path):
    host = nn.Linear(6, 5)
    stats = {"0": {"weight_grad": torch.randn(5, 6)}}
    model, delta = adapted(copy.deepcopy(host), stats, density=0.2, mask="gradient")
    with torch.no_grad():
        delta.value.normal_()
    graft.adapters(model)["default"].save(tmp_path / "adapter")
    again = nn.Sequential(host)
    graft.load(again, tmp_path / "adapter")
    x = torch.randn(3, 6)
    assert torch.equal(again(x), model(x))
