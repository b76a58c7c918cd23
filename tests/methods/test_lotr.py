"""LoTR: the dense formula, the count of parameters, and what the shared factors learn from."""

import pytest
import torch
from torch import nn

import graft
from models import move


class Blocks(nn.Module):
    def __init__(self, layers=3, width=6):
        super().__init__()
        self.q = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.out = nn.Linear(width, 4)

    def forward(self, x):
        for q in self.q:
            x = x + torch.tanh(q(x))
        return self.out(x)


def test_is_one_tucker_tensor_of_two_modes():
    torch.manual_seed(0)
    model = Blocks().double()
    adapter = graft.attach(model, graft.LoTR(rank=2, alpha=3.0), r"q\.\d")
    assert sum(p.numel() for p in adapter.parameters()) == 2 * (6 + 6) + 3 * 2**2
    move(adapter)
    state = graft.merged_state_dict(model)
    changes = torch.stack([state[f"q.{i}.weight"] - q.weight.detach() for i, q in enumerate(model.q)])
    for axis in (1, 2):
        assert torch.linalg.matrix_rank(changes.transpose(0, axis).flatten(1)) == 2
    A, B = (getattr(adapter.shared, f"{n}_6x6") for n in "AB")
    for i in range(3):
        torch.testing.assert_close(changes[i], 1.5 * B @ adapter.deltas[f"q.{i}"].G @ A)


def test_shared_factors_learn_from_all_layers():
    torch.manual_seed(0)
    model = Blocks().double()
    adapter = move(graft.attach(model, graft.LoTR(rank=2), r"q\.\d"))
    x = torch.randn(5, 6, dtype=torch.float64)
    factors = [adapter.shared.A_6x6, adapter.shared.B_6x6]
    together = torch.autograd.grad(model(x).sin().sum(), factors)
    parts = []
    for path, delta in adapter.deltas.items():  # only one layer's change moves with the factors
        others = {p: d for p, d in adapter.deltas.items() if p != path}
        weights = {f"{p}.weight": d.weight(d.site.weight).detach() for p, d in others.items()}
        own = {f"{path}.weight": delta.weight(delta.site.weight)}
        with adapter.disabled():
            y = torch.func.functional_call(model, weights | own, x)
        parts.append(torch.autograd.grad(y.sin().sum(), factors))
    for i in range(2):
        torch.testing.assert_close(together[i], sum(part[i] for part in parts))
        assert all(part[i].any() for part in parts)


def test_sites_of_other_sizes_have_factors_of_their_own():
    adapter = graft.attach(Blocks(), graft.LoTR(rank=2), r"q\.\d|out")
    assert {n: tuple(p.shape) for n, p in adapter.shared.named_parameters()} == {
        "A_6x6": (2, 6), "B_6x6": (6, 2), "A_4x6": (2, 6), "B_4x6": (4, 2),
    }  # fmt: skip
    with pytest.raises(graft.GraftError, match=r"lotr: rank must be the same at all sites.* q\.1 asks for 4"):
        graft.attach(Blocks(), graft.LoTR(rank={r"q\.1": 4, "*": 2}), r"q\.\d")
