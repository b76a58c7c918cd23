"""The fingerprint of a base model: whether an adapter meets the weights it was trained on."""

import ctypes
import functools
import hashlib
import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .host import base_modules, base_parameters
from .sites.quantised import quantised_sites

SAMPLES = 256  # values of a large tensor at most
WHOLE = 4 * SAMPLES  # values of a tensor which is compared whole
KIND = "1"  # raised when the values are taken in another way; leads the fingerprint


def fingerprint(model: nn.Module, without: Iterable[str] = ()) -> str | None:
    """A hash of the base's weights: sha256 over names, shapes and values of its tensors, 256 of large ones.

    Values are rounded to bfloat16, so that one checkpoint loaded in float32 or bfloat16 has one fingerprint. Adapters
    on the model do not count, nor do parameters inside the modules `without` (heads that a file brings along). Of a
    quantised layer the codes are taken, buffers included: a quantised base is another one than the original.
    Fingerprints of different kinds (the number before the dash) cannot be compared.
    None where values are out of reach (meta device, weights offloaded to disk): such a base cannot be told.
    """
    prefixes = tuple(f"{path}." for path in without)
    tensors = {n: t for n, t in sorted(_tensors(model).items()) if not n.startswith(prefixes)}
    if any(t.is_meta for t in tensors.values()):
        return None
    digest = hashlib.sha256("".join(f"{n}{list(t.shape)}" for n, t in tensors.items()).encode())
    samples = [_sample(t) for t in tensors.values()]
    for chosen, dtype in (
        ([s for s in samples if s.is_floating_point()], torch.bfloat16),
        ([s for s in samples if not s.is_floating_point()], torch.int64),
    ):
        if chosen:
            one_place = len({s.device for s in chosen}) == 1
            values = torch.cat(chosen if one_place else [s.cpu() for s in chosen]).to("cpu", dtype)
            digest.update(ctypes.string_at(values.data_ptr(), values.numel() * values.element_size()))
    return f"{KIND}-{digest.hexdigest()}"


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    found = base_parameters(base_modules(model))
    for site in quantised_sites(model):
        codes = {f"{site.path}.{name}".lstrip("."): t for name, t in site.codes().items()}
        own = {id(p) for p in site.module._parameters.values()}
        found = {n: p for n, p in found.items() if id(p) not in own} | codes
    return found


@torch.no_grad()
def _sample(tensor: Tensor) -> Tensor:
    flat = tensor.reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    return flat[:: _step(flat.numel(), tensor.shape[-1] if tensor.dim() else 1)]


@functools.lru_cache(maxsize=1024)
def _step(count: int, columns: int) -> int:
    """How far apart values are taken: in each row another column, lest a matrix show few of its columns."""
    if count <= WHOLE:
        return 1
    step = -(-count // SAMPLES)
    if columns > SAMPLES // 4:
        # k + g or 1 / (n + g) columns, g the golden section: the multiples of that lie evenly in the columns.
        share, g = step / columns, (math.sqrt(5) - 1) / 2
        step = math.ceil(columns * (math.ceil(share - g) + g if share > 1 else 1 / (math.floor(1 / share - g) + g)))
    while columns <= SAMPLES and math.gcd(step, columns) > 1:
        step += 1
    return step
