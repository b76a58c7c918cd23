"""LoRA-FA: that A stays, what is kept for backward, and the best gradient of B in closed form."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import graft


def adapted(recipe, d_in=32, d_out=24, seed=0):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(d_in, d_out)).double()
    return model, graft.attach(model, recipe, "0", seed=seed)


@settings(max_examples=20, deadline=None)
@given(d_in=st.integers(1, 12), d_out=st.integers(1, 12), data=st.data())
def test_rows_are_orthonormal_and_stay_in_training(d_in, d_out, data):
    model, adapter = adapted(graft.LoRAFA(rank=data.draw(st.integers(1, d_in))), d_in, d_out)
    delta = adapter.deltas["0"]
    before = delta.A.clone()
    torch.testing.assert_close(before @ before.T, torch.eye(len(before), dtype=torch.float64), atol=1e-6, rtol=0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.1)
    model(torch.randn(5, d_in, dtype=torch.float64)).sin().sum().backward()
    optimizer.step()
    assert torch.equal(delta.A, before) and delta.B.abs().sum() > 0
    assert [p.shape for p in adapter.parameters()] == [(d_out, len(before))]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_input_is_not_kept_for_backward(dropout):
    def kept(recipe):
        model, _ = adapted(recipe)
        x, sizes = torch.randn(40, 32, dtype=torch.float64, requires_grad=True), []
        before = x * 1  # an activation: what is kept of it is its own memory
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t) or t, lambda t: t):
            model(before)
        return sum(t.nbytes for t in sizes if t.shape == x.shape and t.is_floating_point())

    of_input = 40 * 32 * 8
    frozen = kept(graft.LoRAFA(rank=2, dropout=dropout))
    assert frozen == (of_input if dropout else 0)  # what dropout multiplied with
    assert kept(graft.LoRA(rank=2, dropout=dropout)) - frozen == of_input


def test_the_gradient_is_a_multiple_of_the_best_one():
    """Of the steps of B, that whose change of W is nearest to the gradient of W: least squares, and PEFT's formula."""
    model, adapter = adapted(graft.LoRAFA(rank=3, alpha=5.0))
    delta = adapter.deltas["0"]
    w = model[0].weight.detach().clone().requires_grad_()
    x = torch.randn(9, 32, dtype=torch.float64)
    model(x).sin().sum().backward()
    nn.functional.linear(x, w, model[0].bias).sin().sum().backward()
    s = 5.0 / 3
    best = torch.linalg.lstsq(s * delta.A.T, w.grad.T).solution.T  # s G A ~ dL/dW
    torch.testing.assert_close(delta.B.grad / s**2, best, rtol=1e-5, atol=1e-6)
    inverse = torch.linalg.inv(delta.A @ delta.A.T)
    torch.testing.assert_close(delta.B.grad @ inverse / s**2, best)


def test_a_is_drawn_again_from_the_seed(tmp_path):
    model, adapter = adapted(graft.LoRAFA(rank=3), seed=5)
    assert list(adapter.state_dict()) == ["0:B"]
    with torch.no_grad():
        adapter.deltas["0"].B.normal_()
    adapter.save(tmp_path / "a")
    again = adapted(graft.LoRA(), seed=9)[0]
    graft.adapters(again)["default"].detach()
    graft.load(again, tmp_path / "a")
    x = torch.randn(4, 32, dtype=torch.float64)
    assert torch.equal(again(x), model(x))
    other = adapted(graft.LoRAFA(rank=3), seed=6)[1]
    assert not torch.allclose(other.deltas["0"].A, adapter.deltas["0"].A)


def test_more_rows_than_inputs_are_refused():
    with pytest.raises(graft.GraftError, match="lora_fa: rank must be at most the 32 inputs of 0, not 33"):
        adapted(graft.LoRAFA(rank=33))
