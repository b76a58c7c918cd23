"""AdaLoRA against PEFT's layer, its RankAllocator and its penalty; the budget and the choice of triplets."""

import copy
from types import SimpleNamespace

import peft
import pytest
import torch
from against_peft import both, fill, same
from peft import AdaLoraConfig
from torch import nn

import graft


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_is_pefts_layer(kind):
    torch.manual_seed(0)
    if kind == "linear":
        host, x = nn.Linear(8, 12), torch.randn(3, 5, 8, dtype=torch.float64)
    else:
        host, x = nn.Conv2d(4, 12, 3, stride=2, padding=1), torch.randn(2, 4, 7, 7, dtype=torch.float64)
    config = AdaLoraConfig(init_r=3, target_r=2, lora_alpha=5, total_step=9)
    ours, delta, layer = both(host, graft.AdaLoRA(rank=3, target_rank=2, alpha=5.0), config)
    with torch.no_grad():
        layer.ranknum["default"].fill_(3 - 1e-5)  # they divide by the rank plus 1e-5
    pairs = [(delta.Q, layer.lora_A["default"]), (delta.P, layer.lora_B["default"]), (delta.e, layer.lora_E["default"])]
    fill(pairs)
    same(ours, layer, pairs, x)


class Three(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 5), nn.Linear(5, 7)

    def forward(self, x):
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


SITES = ("a", "b", "c")


def pair(total, warmup=0, cooldown=0, **kw):
    """The same adapter here and in PEFT, with equal tensors: (our model, adapter, their model, [(ours, theirs)])."""
    torch.manual_seed(0)
    base = Three().double()
    ours = copy.deepcopy(base)
    recipe = graft.AdaLoRA(rank=6, target_rank=2, warmup=warmup / total, cooldown=cooldown / total, **kw)
    adapter = graft.attach(ours, recipe, "[abc]")
    config = AdaLoraConfig(
        init_r=6, target_r=2, tinit=warmup, tfinal=cooldown, total_step=total, target_modules=list(SITES)
    )
    theirs = peft.get_peft_model(base, config, autocast_adapter_dtype=False).double()
    pairs = []
    for path in SITES:
        layer, delta = getattr(theirs.base_model.model, path), adapter.deltas[path]
        for mine, other in ((delta.Q, "lora_A"), (delta.P, "lora_B"), (delta.e, "lora_E")):
            pairs.append((mine, getattr(layer, other)["default"]))
    fill(pairs)
    return ours, adapter, theirs, pairs


@pytest.mark.parametrize("warmup, cooldown", [(0, 0), (3, 4), (1, 7)])
def test_budget_importance_and_choice_are_those_of_pefts_allocator(warmup, cooldown):
    total = 20
    _, adapter, theirs, pairs = pair(total, warmup, cooldown, beta1=0.8, beta2=0.6)
    allocator = theirs.base_model.rankallocator
    allocator.beta1, allocator.beta2 = 0.8, 0.6
    deltas = list(adapter.deltas.values())
    chosen = []
    for step in range(1, total + 1):
        torch.manual_seed(step)
        with torch.no_grad():  # an optimiser's step: the same numbers for both
            for mine, other in pairs:
                mine.copy_(torch.randn_like(mine))
                other.copy_(mine.reshape(other.shape))
                mine.grad = torch.randn_like(mine)
                other.grad = mine.grad.reshape(other.shape).clone()
        budget, _ = allocator.budget_schedule(step)
        assert adapter.recipe.method.budget(deltas, step / total) == budget
        if step <= total - cooldown:
            theirs.base_model.update_and_allocate(step)
        adapter.step(step / total)
        for path in SITES:
            e, keep = adapter.deltas[path].e, adapter.deltas[path].keep
            if warmup < step <= total - cooldown:
                other = getattr(theirs.base_model.model, path).lora_E["default"]
                assert torch.equal(e, other.flatten()) and torch.equal(keep != 0, other.flatten() != 0)
        if step < total - cooldown:
            for name, kind in {"P": "lora_B", "Q": "lora_A", "e": "lora_E"}.items():
                score = torch.cat([(j * u).flatten() for j, u in (d.averages(name) for d in deltas)])
                keys = [f"{p}.{kind}.default" for p in SITES]
                torch.testing.assert_close(score, torch.cat([allocator._element_score(k).flatten() for k in keys]))
        kept = torch.cat([d.keep for d in deltas])
        assert kept.sum() == budget
        chosen.append(kept)
    assert chosen[-1].sum() == 2 * len(SITES)
    for later in chosen[total - cooldown :]:
        assert torch.equal(later, chosen[-1])


def test_penalty_is_pefts():
    _, adapter, theirs, _ = pair(9, gamma=0.5)

    class Output:
        loss = None

    theirs.base_model.model.forward = lambda: SimpleNamespace(loss=torch.zeros((), dtype=torch.float64))
    torch.testing.assert_close(adapter.penalty(), theirs.base_model.forward().loss)


def test_penalty_vanishes_where_the_factors_are_orthogonal():
    _, adapter, _, _ = pair(9)
    with torch.no_grad():
        for d in adapter.deltas.values():
            d.P.copy_(torch.eye(*d.P.shape))
            d.Q.copy_(torch.eye(*d.Q.shape))
        adapter.deltas["a"].P[0, 0] = 2.0  # one of six matrices: |4 - 1|
    # b and c have fewer than six rows or columns, so that one direction of four matrices is left out
    rest = sum((6 - min(6, size)) ** 0.5 for size in (8, 6, 5, 8, 7, 5))
    torch.testing.assert_close(adapter.penalty().item(), 0.1 * (3 + rest) / 6)


def test_a_triplet_left_out_has_no_effect_and_can_come_back():
    ours, adapter, _, _ = pair(10)
    delta = adapter.deltas["a"]
    x = torch.randn(4, 6, dtype=torch.float64)
    with torch.no_grad():
        delta.keep[2] = 0
    y = ours(x)
    gradient = torch.autograd.grad(y.sin().sum(), delta.e)[0]
    assert gradient[2] != 0  # still learns
    with torch.no_grad():
        delta.e[2] += 5.0
    assert torch.equal(ours(x), y)
    with torch.no_grad():
        delta.keep[2] = 1
    assert not torch.allclose(ours(x), y)


class Parallel(nn.Module):
    def __init__(self):
        super().__init__()
        self.sites = nn.ModuleList(nn.Linear(12, 12) for _ in range(3))

    def forward(self, x):
        return torch.stack([site(x) for site in self.sites])


def test_budget_goes_to_the_site_that_needs_it():
    """Only one of three layers of the teacher differs from the base: the ranks kept must gather there."""
    torch.manual_seed(0)
    student = Parallel()
    teacher = copy.deepcopy(student)
    with torch.no_grad():
        teacher.sites[1].weight += torch.randn(12, 4) @ torch.randn(4, 12) / 4
    adapter = graft.attach(student, graft.AdaLoRA(rank=4, target_rank=1, cooldown=0.3), r"sites\.\d")
    optimizer = torch.optim.Adam(adapter.parameters(), 0.02)
    for step in range(100):
        x = torch.randn(64, 12)
        loss = (student(x) - teacher(x)).square().mean() + adapter.penalty()
        optimizer.zero_grad()
        loss.backward()
        adapter.step((step + 1) / 100)
        optimizer.step()
    assert [int(d.keep.sum()) for d in adapter.deltas.values()] == [0, 3, 0]


def test_frozen_and_unused_sites_count_as_unimportant():
    ours, adapter, _, _ = pair(10)
    ours(torch.randn(4, 6, dtype=torch.float64)).square().sum().backward()
    for p in adapter.deltas["b"].parameters():
        p.grad = None  # an expert that saw no token
    adapter.step(0.49)  # just before the ranks are settled
    assert adapter.deltas["b"].keep.sum() == 0


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(rank=4, target_rank=5), "target_rank must be at most rank = 4, not 5"),
        (dict(warmup=0.5, cooldown=0.5), "warmup [+] cooldown must be below 1, not 1"),
    ],
)
def test_impossible_schedules_are_refused(wrong, message):
    with pytest.raises(graft.GraftError, match=message):
        graft.attach(Three(), graft.AdaLoRA(**wrong), "a")
