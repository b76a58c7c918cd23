"""SPT: factors where many entries are sensitive, single entries elsewhere, never more parameters than the budget."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import graft


def adapted(scales, seed=0, **hyper):
    """Matrices 12 x 10, whose sensitivities are uniform in [0, scale]."""
    torch.manual_seed(seed)
    model = nn.ModuleList(nn.Linear(10, 12) for _ in scales)
    stats = {str(i): {"weight_square": scale * torch.rand(12, 10)} for i, scale in enumerate(scales)}
    return stats, graft.attach(model, graft.SPT(**hyper), [*stats], stats=stats)


def count(adapter):
    return sum(p.numel() for p in adapter.parameters())


@settings(max_examples=40, deadline=None)
@given(
    scales=st.lists(st.sampled_from([0.1, 1.0, 10.0]), min_size=1, max_size=4),
    density=st.floats(0.05, 1),
    rank=st.integers(1, 3),
    ease=st.floats(1, 10),
    seed=st.integers(0, 20),
)
def test_the_budget_is_kept_and_the_most_sensitive_are_trained(scales, density, rank, ease, seed):
    budget = round(density * 120 * len(scales))
    try:
        stats, adapter = adapted(scales, seed, density=density, rank=rank, ease=ease)
    except graft.GraftError:
        assert rank * 22 / ease <= 1 and rank * 22 > budget
        return
    assert 0 < count(adapter) <= budget
    single = {path: d for path, d in adapter.deltas.items() if d.A is None}
    for path, delta in adapter.deltas.items():
        assert path not in single or 0 < len(delta.value) < rank * 22 / ease
    worst = min((stats[p]["weight_square"].flatten()[d.index.long()].min() for p, d in single.items()), default=None)
    for path, found in stats.items():
        if worst is not None and (path in single or path not in adapter.deltas):
            rest = found["weight_square"].flatten().clone()
            if path in single:
                rest[single[path].index.long()] = 0
            assert rest.max() <= worst


def test_the_sensitive_matrix_gets_factors_and_the_others_entries_or_nothing():
    _, adapter = adapted([10.0, 0.9, 0.001], density=0.2, rank=2, ease=1.0)
    assert "2" not in adapter.deltas and adapter.deltas["0"].A is not None
    _, alone = adapted([10.0, 0.9, 0.001], density=0.05, rank=2, ease=1.0)
    assert [*alone.deltas] == ["0"] and alone.deltas["0"].A is None and count(alone) == 18


def test_both_forms_are_saved_and_merged(tmp_path):
    _, adapter = adapted([10.0, 1.0], density=0.15, rank=1, ease=1.0)
    forms = {path: d.A is None for path, d in adapter.deltas.items()}
    assert {*forms.values()} == {True, False}
    for p in adapter.parameters():
        nn.init.normal_(p)
    expect = graft.merged_state_dict(adapter.model)
    adapter.save(tmp_path / "adapter")
    torch.manual_seed(0)
    again = nn.ModuleList(nn.Linear(10, 12) for _ in range(2))
    loaded = graft.load(again, tmp_path / "adapter")
    assert {path: d.A is None for path, d in loaded.deltas.items()} == forms
    for key, value in graft.merged_state_dict(again).items():
        assert torch.equal(value, expect[key])
    with graft.merge(again):
        torch.testing.assert_close(again[1].weight, expect["1.weight"])


def test_a_budget_too_small_is_refused():
    with pytest.raises(graft.GraftError, match="density gives 0 parameters to 1 matrices"):
        adapted([1.0], density=0.001)
