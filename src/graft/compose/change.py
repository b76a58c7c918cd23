"""What a delta changes, in one form for every method: dW = W' - W and db = b' - b, against the base."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..core.delta import Delta
from ..core.factored import wide
from ..core.host import Host, is_owned
from ..methods.weight.full import Full

MATRICES = ("linear", "conv", "embedding")  # kinds of hosts which own a matrix [out, in]


class LowRank(NamedTuple):
    """The matrix B A, with A [k, in] and B [out, k]; k may be zero."""

    A: Tensor
    B: Tensor


class Change(NamedTuple):
    """The change of a host's matrix [out, in] and of its bias [out], or None where the bias stays.

    `rounding` bounds the Frobenius norm of what rounding put into the matrix when it was taken as a difference.
    """

    matrix: Tensor | LowRank
    bias: Tensor | None
    rounding: float = 0.0


def change_of(delta: Delta) -> Change:
    """What `delta` changes at a host with a matrix; as factors where it has them or leaves the matrix as it is."""
    site, factors, entries, rounding = delta.site, delta.factors(), delta.entries(), 0.0
    if entries is not None:
        index, values = entries
        zeros = wide(site.weight).new_zeros(site.d_out * site.d_in)
        matrix = zeros.index_add(0, index, wide(values)).view(site.d_out, site.d_in)
    elif factors is None:
        w = wide(site.weight)
        new = delta.weight(w)
        zero = LowRank(w.new_zeros(0, site.d_in), w.new_zeros(site.d_out, 0))
        matrix = zero if new is w else new - w
        rounding = 0.0 if new is w else 4 * torch.finfo(w.dtype).eps * size(w)
    else:
        matrix = LowRank(*map(wide, factors))
    old = site.bias
    new = delta.bias(old)
    if new is None or new is old:
        return Change(matrix, None, rounding)
    bias = wide(new) if old is None else wide(new) - wide(old)
    return Change(matrix, bias if bias.any() else None, rounding)


def is_low_rank(delta: Delta) -> bool:
    """Whether `change_of` gives factors."""
    w = delta.site.weight
    return delta.factors() is not None or delta.weight(w) is w


def dense(matrix: Tensor | LowRank) -> Tensor:
    return matrix.B @ matrix.A if isinstance(matrix, LowRank) else matrix


def scaled(matrix: Tensor | LowRank, weight: float) -> Tensor | LowRank:
    return LowRank(matrix.A, weight * matrix.B) if isinstance(matrix, LowRank) else weight * matrix


def added(matrices: list[Tensor | LowRank]) -> Tensor | LowRank:
    """The sum; factors are put side by side, so that their ranks add up."""
    factors = [m for m in matrices if isinstance(m, LowRank)]
    if len(factors) < len(matrices):
        return torch.stack([dense(m) for m in matrices]).sum(0)
    return LowRank(torch.cat([m.A for m in factors]), torch.cat([m.B for m in factors], 1))


def svd(matrix: Tensor | LowRank) -> tuple[Tensor, Tensor, Tensor]:
    """U [out, n], the singular values [n], V [n, in]; factors are never multiplied out."""
    if not isinstance(matrix, LowRank):
        return torch.linalg.svd(matrix, full_matrices=False)
    (left, B), (right, A) = torch.linalg.qr(matrix.B), torch.linalg.qr(matrix.A.T)
    U, S, V = torch.linalg.svd(B @ A.T, full_matrices=False)
    return left @ U, S, V @ right.T


def size(matrix: Tensor | LowRank) -> float:
    """The Frobenius norm."""
    if isinstance(matrix, LowRank):
        matrix = torch.linalg.qr(matrix.B, mode="r").R @ torch.linalg.qr(matrix.A.T, mode="r").R.T
    return torch.linalg.vector_norm(matrix).item()


def own_state(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of a module in the layout of a checkpoint, without those of adapters on it."""
    owned = tuple(f"{path}." for path, m in module.named_modules() if is_owned(m))
    return {name: t for name, t in module.state_dict().items() if not name.startswith(owned)}


def new_state(delta: Delta) -> dict[str, Tensor]:
    """Those tensors of the host, in its layout, which `delta` gives another value."""
    return delta.copy.state_dict() if isinstance(delta, Full) else delta.tensors(Host(delta.site, delta.site.module))
