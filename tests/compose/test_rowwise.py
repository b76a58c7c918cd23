"""What is computed for all rows at once is what torch.func.vmap computes."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import vmap

from graft.compose.rowwise import Rows, Unsupported

# f(x [k, tokens, 6], A [6, 6], v [6]), and w, u of the same shapes which all rows have in common
FUNCTIONS = {
    "linear": lambda x, A, v, w, u: F.linear(x, A),
    "linear with biases": lambda x, A, v, w, u: F.linear(F.linear(F.linear(x, A, v), A, u), w, u),
    "matmul": lambda x, A, v, w, u: (x @ A) @ w,
    "addmm": lambda x, A, v, w, u: torch.addmm(x.reshape(-1, 6), x.flatten(0, 1), A.T).view(x.shape),
    "addcmul": lambda x, A, v, w, u: torch.addcmul(x, x - u, v),
    "vectors": lambda x, A, v, w, u: (2 * x + v) * (u - v) / (v * v + 1) + (u + x * u),
    "blocks": lambda x, A, v, w, u: torch.einsum("...nc,cd->...nd", x.unflatten(-1, (-1, 6)), A).flatten(-2),
    "shapes": lambda x, A, v, w, u: x.transpose(-2, -1).transpose(1, 2).reshape(x.shape).sum(-2) * v,
    "activations": lambda x, A, v, w, u: F.gelu(F.relu(x) + F.silu(x)) * torch.tanh(torch.sigmoid(x)),
    "outer": lambda x, A, v, w, u: A * v + w,
}


@pytest.mark.parametrize("name", FUNCTIONS)
@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 4), k=st.integers(1, 3), tokens=st.integers(1, 3), seed=st.integers(0, 99))
def test_agrees_with_vmap(name, n, k, tokens, seed):
    draw = torch.Generator().manual_seed(seed)
    new = lambda *shape: torch.randn(shape, generator=draw, dtype=torch.float64)
    x, A, v, w, u = new(n, k, tokens, 6), new(n, 6, 6), new(n, 6), new(6, 6), new(6)
    expected = vmap(FUNCTIONS[name], (0, 0, 0, None, None))(x, A, v, w, u)
    got = FUNCTIONS[name](Rows(x), Rows(A), Rows(v), w, u)
    torch.testing.assert_close(got.all, expected)


@pytest.mark.parametrize(
    "act",
    [
        lambda x: x.cumsum(0),
        lambda x: x.sum(),
        lambda x: x[0],
        lambda x: -x,
        lambda x: 1 - x,
        lambda x: torch.ones(3) - x**2,
        lambda x: x > 0,
        lambda x: x == x,
        lambda x: [*x],
        lambda x: torch.cat([x, x]),
        lambda x: torch.softmax(x, -1),
        lambda x: F.linear(torch.ones(2, 3), x),
        lambda x: F.relu(x, inplace=True),
        lambda x: F.dropout(x, 0.5, True),
    ],
)
def test_what_it_does_not_know_is_left_to_vmap(act):
    with pytest.raises(Unsupported):
        act(Rows(torch.zeros(4, 2, 3)))
