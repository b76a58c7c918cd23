"""LT-SFT: the entries which full fine-tuning moves most, exactly as many as asked for, and changes that add up."""

import torch
from torch import nn

import graft


def tuned(seed):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    torch.manual_seed(seed)
    batches = [torch.randn(5, 6, dtype=torch.float64) for _ in range(4)]
    loss = lambda m, x: (m(x) - x[:, :4]).square().mean()
    stats = graft.collect(model, batches, ("weight_change",), ["0", "2"], loss, learning_rate=1e-2)
    return model, stats


def test_the_entries_are_those_with_the_largest_change_over_all_matrices():
    model, stats = tuned(1)
    adapter = graft.attach(model, graft.LTSFT(density=0.1), ["0", "2"], stats=stats)
    changes = torch.cat([s["weight_change"].abs().flatten() for s in stats.values()])
    keep = round(0.1 * len(changes))
    assert sum(len(d.value) for d in adapter.deltas.values()) == keep
    least = changes.topk(keep).values[-1]
    for path, delta in adapter.deltas.items():
        chosen = (stats[path]["weight_change"].abs() >= least).flatten().nonzero().flatten()
        assert torch.equal(delta.index.long(), chosen)


def test_a_matrix_that_hardly_moves_is_left_alone():
    model, stats = tuned(1)
    stats["2"]["weight_change"] *= 1e-6
    adapter = graft.attach(model, graft.LTSFT(density=0.1), ["0", "2"], stats=stats)
    assert [*adapter.deltas] == ["0"] and not hasattr(model[2], "deltas")


def test_two_trainings_compose_by_addition():
    model, stats = tuned(1)
    _, others = tuned(2)
    base = {k: v.clone() for k, v in model.state_dict().items()}
    changes = []
    for name, found in (("task", stats), ("language", others)):
        adapter = graft.attach(model, graft.LTSFT(density=0.2), ["0", "2"], name=name, stats=found)
        for delta in adapter.deltas.values():
            nn.init.normal_(delta.value)
        graft.activate(model, name)
        merged = graft.merged_state_dict(model)
        changes.append({k: merged[k] - base[k] for k in base})
    graft.combine(model, {"task": 1.0, "language": 1.0})
    together = graft.merged_state_dict(model)
    for key, value in base.items():
        torch.testing.assert_close(together[key], value + changes[0][key] + changes[1][key])
