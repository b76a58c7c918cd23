"""LoLDU: one diagonal and one scale between the frozen triangles of W."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from one_layer import adapted, linear

import graft


@settings(max_examples=25, deadline=None)
@given(
    d_in=st.integers(1, 8), d_out=st.integers(1, 8), rank=st.integers(1, 9), alpha=st.floats(0.1, 8),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_is_the_residual_and_the_scaled_diagonal(d_in, d_out, rank, alpha, seed):
    host = linear(d_in, d_out, seed=seed)
    w, x = host.weight.detach().clone(), torch.randn(4, d_in, dtype=torch.float64)
    model, delta = adapted(host, graft.LoLDU(rank=rank, alpha=alpha), seed)
    assert sum(p.numel() for p in delta.parameters()) == min(rank, d_in, d_out) + 1
    # As the authors' code has it: a residual takes the place of W.
    P, L, U = torch.linalg.lu(w)
    D = U.diagonal()
    PL, Dr, Ur = (P @ L)[:, : len(D)][:, :rank], D[:rank], (U[: len(D)] / D[:, None])[:rank]
    residual = w - alpha / rank * (PL * Dr) @ Ur
    new = residual + delta.scale.detach() * (PL * delta.z.detach()) @ Ur
    size = 1e-5 * max(1, Ur.abs().max().item())  # small pivots make large rows, which are kept in float32
    torch.testing.assert_close(delta.weight(w), new, rtol=1e-5, atol=size)
    torch.testing.assert_close(model(x), x @ new.T + host.bias, rtol=1e-5, atol=10 * size)


def test_a_zero_pivot_is_no_division():
    host = linear(4, 4)
    with torch.no_grad():
        host.weight[:, 1] = host.weight[:, 0]
    _, delta = adapted(host, graft.LoLDU())
    assert delta.weight(host.weight).isfinite().all()
