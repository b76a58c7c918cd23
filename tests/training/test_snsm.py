"""SNSM against Adam, against pytorch-optimizer's subset norm, and against its formula with dense projections."""

import math

import pytest
import torch
from torch import nn

from graft.core.errors import GraftError
from graft.training import optimizers
from graft.training.optimizers.snsm import SNSM


def run(optimizer, parameters, steps=7, seed=0):
    """Steps on the same gradients, of low rank in a direction that turns."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        optimizer.step()
    return [p.detach() for p in parameters]


def parameters(*shapes):
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in shapes]


def test_with_subsets_of_one_entry_and_momentum_everywhere_it_is_adam():
    shapes = (4, 6), (6,), (2, 3, 4)
    ours, theirs = parameters(*shapes), parameters(*shapes)
    a = run(SNSM(ours, lr=0.1, subset=1, eps=1e-30, weight_decay=0.0), ours)
    b = run(torch.optim.Adam(theirs, lr=0.1, eps=1e-30), theirs)
    for mine, other in zip(a, b):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("subset", [3, 4, 12])
def test_subset_norm_is_that_of_pytorch_optimizer(subset):
    library = pytest.importorskip("pytorch_optimizer")
    ours, theirs = parameters((4, 6), (6, 4)), parameters((4, 6), (6, 4))
    a = run(SNSM(ours, lr=0.1, subset=subset, weight_decay=0.02), ours)
    groups = [{"params": theirs, "sn": True}]
    b = run(library.AdamWSN(groups, lr=0.1, eps=1e-6, weight_decay=0.02, subset_size=subset), theirs)
    for mine, other in zip(a, b):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("shape", [(7, 4), (4, 7)])
def test_it_is_its_formula(shape):
    (ours,) = parameters(shape)
    lr, beta1, beta2, eps, decay, rank, gap = 0.05, 0.8, 0.95, 1e-6, 0.1, 2, 3
    optimizer = SNSM([ours], lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=decay, rank=rank, gap=gap)
    w, v, m = ours.detach().clone(), 0, torch.zeros(shape, dtype=torch.float64)
    generator, along = torch.Generator().manual_seed(1), shape.index(min(shape))
    for t in range(1, 9):
        g = torch.randn(shape, generator=generator, dtype=torch.float64)
        if t == 1 or t % gap == 0:
            U, _, V = torch.linalg.svd(g.float(), full_matrices=False)
            basis = (U[:, :rank] if along == 0 else V[:rank].T).double()
            m = torch.zeros_like(m)
        project = lambda x, basis=basis: basis @ basis.T @ x if along == 0 else x @ basis @ basis.T
        v = beta2 * v + (1 - beta2) * g.square().sum(along, keepdim=True)
        m = beta1 * m + (1 - beta1) * project(g)
        step = (m + g - project(g)) / (v.sqrt() + eps) * math.sqrt(1 - beta2**t) / (1 - beta1**t)
        w = (w - lr * step) * (1 - lr * decay)
        ours.grad = g.clone()
        optimizer.step()
        torch.testing.assert_close(ours.detach(), w, rtol=1e-5, atol=1e-6)


def test_the_state_has_the_size_of_its_formula():
    n, m, rank = 40, 24, 3
    (p,) = parameters((n, m))
    optimizer = SNSM([p], rank=rank)
    run(optimizer, [p], steps=2)
    count = sum(t.numel() for t in optimizer.state[p].values() if torch.is_tensor(t))
    assert count == n * (1 + rank) + m * rank < 0.25 * 2 * n * m


def test_it_is_found_by_name_and_its_options_are_checked():
    assert optimizers.find("snsm") is SNSM
    made = optimizers.build("snsm", parameters((4, 6)), learning_rate=0.1, options={"rank": 2})
    assert made.param_groups[0]["rank"] == 2
    with pytest.raises(GraftError, match=r"snsm does not take .*: subset is 'side' or a number above 0, not 0"):
        optimizers.build("snsm", parameters((4, 6)), learning_rate=0.1, options={"subset": 0})
