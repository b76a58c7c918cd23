"""BOFT: the factors are those of a butterfly, orthogonal, and dense blocks together; PEFT's layer."""

import peft
import peft.tuners.boft.layer as theirs
import pytest
import torch
from against_peft import both
from hypothesis import given, settings
from hypothesis import strategies as st
from one_layer import adapted, linear

import graft


def dense(blocks, level):
    """The matrix of one factor, block by block: feature i of a block lies `step` apart where it changes halves."""
    n, side = blocks.shape[:2]
    half, step = side // 2, (side << level) // 2
    whole = torch.zeros(n * side, n * side, dtype=blocks.dtype)
    for i, block in enumerate(blocks):
        if level == 0:
            at = torch.arange(side) + i * side
        else:
            part, pair = divmod(i, 1 << level)
            low = part * 2 * step + pair * half + torch.arange(half)
            at = torch.cat([low, low + step])
        whole[at[:, None], at] = block
    return whole


@settings(max_examples=25, deadline=None)
@given(
    half=st.integers(1, 3) | st.just(16), factors=st.integers(1, 3), parts=st.integers(1, 3), d_out=st.integers(1, 6),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_turns_the_inputs_by_the_butterfly(half, factors, parts, d_out, seed):
    side = 2 * half << (factors - 1)
    host = linear(parts * side, d_out, seed=seed)
    w, x = host.weight.detach().clone(), torch.randn(4, parts * side, dtype=torch.float64)
    model, delta = adapted(host, graft.BOFT(block=2 * half, factors=factors), seed)
    B = torch.eye(parts * side, dtype=torch.float64)
    for level, blocks in enumerate(delta.rotations()):
        B = dense(blocks.detach(), level) @ B
    torch.testing.assert_close(B @ B.T, torch.eye(len(B), dtype=B.dtype))
    reached = torch.block_diag(*torch.ones(parts, side, side))  # every feature of a part reaches every other one
    assert torch.equal(B.abs() > 1e-12, reached > 0)
    torch.testing.assert_close(model(x), delta.scale * ((x @ B) @ w.T) + host.bias)
    torch.testing.assert_close(delta.weight(w), delta.scale[:, None] * (w @ B.T))


def test_one_factor_without_scale_is_oft():
    host, x = linear(12, 5), torch.randn(3, 12, dtype=torch.float64)
    one, boft = adapted(host, graft.BOFT(block=4))
    two, oft = adapted(linear(12, 5), graft.OFT(block=4))
    with torch.no_grad():
        oft.triangles.copy_(boft.triangles[0])
        boft.scale.fill_(1)
    torch.testing.assert_close(one(x), two(x))


class _BlockDiagonal:
    """PEFT's kernel, which needs a GPU."""

    @staticmethod
    def apply(blocks):
        return torch.stack([torch.block_diag(*b) for b in blocks])


@pytest.mark.parametrize("factors", [1, 2, 3])
def test_equals_peft(factors, monkeypatch):
    monkeypatch.setattr(theirs, "get_fbd_cuda", lambda: True)
    monkeypatch.setattr(theirs, "FastBlockDiag", _BlockDiagonal)
    config = peft.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=factors)
    ours, delta, reference = both(linear(16, 6), graft.BOFT(block=4, factors=factors), config)
    R, s = reference.boft_R["default"], reference.boft_s["default"]
    torch.manual_seed(1)
    with torch.no_grad():
        R.normal_()
        s.normal_()
        state = {"boft_R": R, "boft_s": s}
        for name, value in graft.BOFT.peft.site_in(delta.site, state, {}).items():
            delta.get_parameter(name).copy_(value)
        written = graft.BOFT.peft.site_out(delta)
    x = torch.randn(3, 5, 16, dtype=torch.float64)
    torch.testing.assert_close(ours(x), reference(x), rtol=1e-6, atol=1e-6)  # PEFT keeps its identity in float32
    with torch.no_grad():
        R.copy_(written["boft_R"])
    torch.testing.assert_close(ours(x), reference(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "hyper, message",
    [
        ({"block": 3}, "boft: block times 2.* = 3 must divide the input size 8 of 0"),
        ({"block": 4, "factors": 3}, "boft: block times 2.* = 16 must divide the input size 8 of 0"),
    ],
)
def test_blocks_that_do_not_fit_are_refused(hyper, message):
    with pytest.raises(graft.GraftError, match=message):
        adapted(linear(8, 4), graft.BOFT(**hyper))


def test_an_odd_block_has_no_halves():
    with pytest.raises(graft.GraftError, match="boft: block must be even where there are several factors, not 3"):
        adapted(linear(12, 4), graft.BOFT(block=3, factors=2))
