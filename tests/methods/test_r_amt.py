"""R-AMT: entries of the frozen weight are left out; scores learn straight through; one bit an entry is stored."""

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from one_layer import adapted, linear
from torch import nn

import graft
from graft.methods.selection.r_amt import pack, unpack
from models import llama, move, tokens


@given(st.integers(1, 5), st.integers(1, 40), st.integers(0, 99))
def test_packing_is_undone_and_takes_an_eighth_of_a_byte_an_entry(rows, columns, seed):
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) > 0.5
    bits = pack(mask)
    assert bits.dtype == torch.uint8 and bits.numel() == rows * -(-columns // 8)
    assert torch.equal(unpack(bits, columns), mask)


def test_entries_are_the_bases_or_zero_and_gradients_pass_straight_through():
    model, delta = adapted(linear(8, 12), graft.RAMT(), size=0.02)
    kept = delta.s > 5e-3
    assert 0 < kept.sum() < kept.numel()
    w = delta.site.weight.detach()
    assert torch.equal(delta.weight(w), torch.where(kept, w, 0))
    x = torch.randn(5, 8, dtype=torch.float64)
    model(x).sin().sum().backward()
    dense = torch.where(kept, w, 0).requires_grad_()
    nn.functional.linear(x, dense, delta.site.bias).sin().sum().backward()
    torch.testing.assert_close(delta.s.grad, dense.grad * w)  # those left out learn as well


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_mask_does_not_depend_on_the_precision_of_the_base(dtype):
    model = nn.Sequential(nn.Linear(8, 12, bias=False)).to(dtype)
    adapter = graft.attach(model, graft.RAMT(), "0")
    delta = adapter.deltas["0"]
    with torch.no_grad():
        delta.s.copy_(5e-3 + 1e-9 * torch.randn(12, 8))  # on both sides, and one in half precision
    kept = delta.s > 5e-3
    assert 0 < kept.sum() < kept.numel()
    assert torch.equal(model(torch.eye(8, dtype=dtype)).T, torch.where(kept, model[0].weight, 0))


def test_the_penalty_is_the_sum_of_the_norms():
    model = llama()
    adapter = move(graft.attach(model, graft.RAMT(strength=0.5)))
    assert {path.rpartition(".")[2] for path in adapter.deltas} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    expect = 0.5 * sum(float(d.s.detach().square().sum().sqrt()) for d in adapter.deltas.values())
    assert adapter.penalty().item() == pytest.approx(expect, rel=1e-5)


def test_a_file_holds_one_bit_an_entry_and_a_state_the_scores(tmp_path):
    model = llama()
    adapter = move(graft.attach(model, graft.RAMT(start=0.02)), by=0.02)
    adapter.save(tmp_path / "adapter")
    held = safetensors.torch.load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    entries = sum(d.s.numel() for d in adapter.deltas.values())
    assert sum(t.nbytes for t in held.values()) * 8 == entries
    assert {k.rpartition(":")[2] for k in adapter.state_dict()} == {"s"}  # what a checkpoint of training keeps
    again = llama()
    loaded = graft.load(again, tmp_path / "adapter", trainable=True)
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)
    for path, delta in loaded.deltas.items():
        kept = adapter.deltas[path].s > 5e-3
        torch.testing.assert_close(delta.s.detach(), torch.where(kept, 0.02, -0.01))
    again(tokens(), labels=tokens()).loss.backward()
    assert all(d.s.grad.any() for d in loaded.deltas.values())


def test_bits_for_another_shape_are_refused(tmp_path):
    adapter = graft.attach(llama(), graft.RAMT())
    adapter.save(tmp_path / "adapter")
    with pytest.raises(graft.GraftError, match=r"k_proj must have one tensor, bits \[20, 5\] of bytes"):
        graft.load(llama(hidden_size=40), tmp_path / "adapter", allow_other_base=True)


def test_a_start_that_is_no_base_is_refused():
    with pytest.raises(graft.GraftError, match="start must be above threshold"):
        graft.attach(nn.Sequential(nn.Linear(4, 4)), graft.RAMT(start=5e-3), "0")
