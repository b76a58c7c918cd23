"""TLoRA: rings of cores, entry by entry; the transform is dense and of full rank, the residual of low rank."""

import itertools
import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from one_layer import adapted, linear
from sizes import largest

import graft
from graft.methods.weight.tlora import digits


def ring(size, cores):
    """The matrix whose entry at two indices is the trace of the product of the matrices at their digits."""
    sizes = [len(c) for c in cores]
    every = list(itertools.product(*map(range, sizes)))
    T = torch.zeros(size, size, dtype=cores[0].dtype)
    for (i, ii), (j, jj) in itertools.product(enumerate(every), enumerate(every)):
        product = torch.eye(cores[0].shape[-1], dtype=T.dtype)
        for core, a, b in zip(cores, ii, jj):
            product = product @ core[a, b]
        T[i, j] = product.trace()
    return T


def chain(cores):
    """[I_1 ... I_D, rank, rank]"""
    rank, made = cores[0].shape[-1], []
    for at in itertools.product(*(range(len(c)) for c in cores)):
        product = torch.eye(rank, dtype=cores[0].dtype)
        for core, i in zip(cores, at):
            product = product @ core[i]
        made.append(product)
    return torch.stack(made)


@settings(max_examples=25, deadline=None)
@given(
    d_in=st.integers(1, 12), d_out=st.integers(1, 12), rank=st.integers(1, 3), residual=st.integers(0, 2),
    cores=st.integers(2, 4), seed=st.integers(0, 99),
)  # fmt: skip
def test_is_a_ring_matrix_and_a_ring(d_in, d_out, rank, residual, cores, seed):
    host = linear(d_in, d_out, seed=seed)
    w, x = host.weight.detach().clone(), torch.randn(4, d_in, dtype=torch.float64)
    model, delta = adapted(host, graft.TLoRA(rank=rank, residual=residual, cores=cores), seed)
    new = w @ ring(d_in, [c.detach() for c in delta.A])
    if residual:
        B, C = chain([c.detach() for c in delta.B]), chain([c.detach() for c in delta.C])
        new = new + torch.einsum("oab,jba->oj", B, C)
    torch.testing.assert_close(delta.weight(w), new)
    torch.testing.assert_close(model(x), x @ new.T + host.bias)


def test_the_transform_is_dense_and_of_full_rank_and_the_residual_is_not():
    host = linear(16, 12)
    w = host.weight.detach().clone()
    _, delta = adapted(host, graft.TLoRA(rank=2, residual=2), size=0.2)
    T = ring(16, [c.detach() for c in delta.A])
    assert torch.linalg.matrix_rank(T) == 16 and (T.abs() > 1e-9).all()
    assert torch.linalg.matrix_rank(delta.weight(w) - w @ T, atol=1e-9) == 4
    assert torch.linalg.matrix_rank(delta.weight(w) - w, atol=1e-9) == 12


def test_no_matrix_of_the_inputs_is_formed():
    model, _ = adapted(linear(256, 2), graft.TLoRA())
    x = torch.randn(3, 256, dtype=torch.float64)
    assert largest(lambda: model(x).sum().backward()) < 256 * 256 / 16


@given(size=st.integers(1, 5000), count=st.integers(1, 5))
def test_digits_multiply_to_the_size(size, count):
    found = digits(size, count)
    assert len(found) == count and math.prod(found) == size


def test_digits_are_near_each_other():
    assert digits(768, 2) == [24, 32] and digits(1024, 3) == [8, 8, 16] and digits(7, 2) == [1, 7]


def test_the_penalty_is_the_distance_of_the_cores_from_the_identity():
    adapter = graft.attach(torch.nn.Sequential(linear(6, 4)), graft.TLoRA(gamma=2.0))
    deltas = list(adapter.deltas.values())
    assert graft.TLoRA.penalty(deltas) == 0
    with torch.no_grad():
        deltas[0].A[0][0, 1, 1, 0] += 3
        deltas[0].A[1][:2, 0, 0, 0] += torch.tensor([3, 4])
    torch.testing.assert_close(graft.TLoRA.penalty(deltas).item(), 2.0 * (3 + 5))
