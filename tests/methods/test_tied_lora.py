"""Tied-LoRA: its grid of ties and frozen parts, with LoRA, VeRA and a frozen A in its corners."""

import itertools

import pytest
import torch
from test_lotr import Blocks

import graft
from models import move

GRID = ["".join(t) for k in range(1, 5) for t in itertools.combinations("ABuv", k) if {"B", "v"} & {*t}]
X = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def adapted(recipe, seed=0):
    torch.manual_seed(0)
    model = Blocks().double()
    return model, graft.attach(model, recipe, r"q\.\d", seed=seed)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("train", GRID)
def test_each_point_of_the_grid_trains_what_it_says_and_is_the_formula(train, tied, tmp_path):
    plain, _ = adapted("ia3")
    model, adapter = adapted(graft.TiedLoRA(rank=2, alpha=3.0, train=train, tied=tied), seed=3)
    torch.testing.assert_close(model(X), plain(X))
    sizes = {"A": 12 * (1 if tied else 3), "B": 12 * (1 if tied else 3), "u": 2 * 3, "v": 6 * 3}
    assert sum(p.numel() for p in adapter.parameters() if p.requires_grad) == sum(sizes[n] for n in train)
    move(adapter)
    for path, delta in adapter.deltas.items():
        A, B, u, v = delta.prepare(None)
        u, v = (torch.ones(n).double() if t is None else t for n, t in ((2, u), (6, v)))
        dense = 1.5 * torch.diag(v) @ B @ torch.diag(u) @ A
        w = delta.site.weight
        torch.testing.assert_close(graft.merged_state_dict(model)[f"{path}.weight"], (w + dense).detach())
        assert dense.any()
    adapter.save(tmp_path / "a")
    saved = sum(t.numel() for t in adapter.state_dict().values())
    assert saved == sum(sizes[n] for n in train)
    again = Blocks().double()
    again.load_state_dict(plain.state_dict(), strict=False)
    graft.load(again, tmp_path / "a", allow_other_base=True)
    assert torch.equal(again(X), model(X))


def test_tied_factors_learn_from_all_layers_and_untied_ones_from_their_own():
    grads = {}
    for tied in (True, False):
        model, adapter = adapted(graft.TiedLoRA(rank=2, tied=tied))
        pairs = [adapter.shared] if tied else [d.pair for d in adapter.deltas.values()]
        with torch.no_grad():
            for d, pair in zip(adapter.deltas.values(), itertools.cycle(pairs)):
                for p, fill in ((pair.A_6x6, 0.3), (pair.B_6x6, 0.2), (d.u, 0.9), (d.v, 1.1)):
                    p.copy_(fill * torch.linspace(-1, 1, p.numel()).sin().view(p.shape) + 0.1)
        model(X).sin().sum().backward()
        grads[tied] = [(p.A_6x6.grad, p.B_6x6.grad) for p in pairs]
    for tied, parts in zip(grads[True][0], zip(*grads[False])):
        torch.testing.assert_close(tied, sum(parts))


@pytest.mark.parametrize("train, tied, other", [("AB", False, graft.LoRA(rank=2)), ("uv", True, graft.VeRA(rank=2))])
def test_corners_of_the_grid(train, tied, other):
    model, adapter = adapted(graft.TiedLoRA(rank=2, train=train, tied=tied))
    theirs, wanted = adapted(other)
    torch.manual_seed(1)
    with torch.no_grad():
        for mine, delta in zip(adapter.deltas.values(), wanted.deltas.values()):
            A, B, u, v = mine.prepare(None)
            if tied:
                mine.u.normal_(), mine.v.normal_()
                delta.d.copy_(8.0 * u), delta.b.copy_(v)  # alpha / rank
                wanted.shared.A.copy_(A), wanted.shared.B.copy_(B)
            else:
                B.normal_()
                delta.A.copy_(A), delta.B.copy_(B)
    torch.testing.assert_close(model(X), theirs(X))
    mine, yours = (sum(p.numel() for p in a.parameters()) for a in (adapter, wanted))
    assert mine == yours


@pytest.mark.parametrize("train", ["", "A", "u", "Au", "AA", "ABw"])
def test_what_cannot_learn_is_refused(train):
    with pytest.raises(graft.GraftError, match="tied_lora: train names some of A, B, u and v, B or v among them"):
        adapted(graft.TiedLoRA(train=train))


def test_sites_that_share_must_agree():
    with pytest.raises(graft.GraftError, match=r"q\.1 trains B, the first one AB"):
        adapted(graft.TiedLoRA(train={r"q\.1": "Bu", "*": "ABuv"}))
