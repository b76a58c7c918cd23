"""NoRA (nested): a LoRA inside frozen singular vectors, of a size that does not depend on the host's."""

import torch
from one_layer import adapted, linear

import graft


def test_the_change_stays_between_the_principal_vectors():
    host = linear(12, 9)
    w, x = host.weight.detach().clone(), torch.randn(4, 12, dtype=torch.float64)
    model, delta = adapted(host, graft.NestedLoRA(rank=5, inner=2))
    U, s, V = torch.linalg.svd(w, full_matrices=False)
    core = (U[:, :5] / s[:5]).T @ (delta.weight(w).detach() - w) @ V[:5].T  # in the basis of W, up to signs
    new = w + (U[:, :5] * s[:5]) @ core @ V[:5]
    assert torch.linalg.matrix_rank(core, atol=1e-6) == 2
    torch.testing.assert_close(delta.weight(w), new, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(x), x @ new.T + host.bias, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(core.abs(), (delta.B @ delta.A).abs(), rtol=1e-4, atol=1e-5)


def test_the_number_of_parameters_is_that_of_the_inner_factors():
    for size in (20, 60):
        _, delta = adapted(linear(size, size), graft.NestedLoRA(rank=6, inner=2))
        assert sum(p.numel() for p in delta.parameters()) == 2 * 6 * 2
