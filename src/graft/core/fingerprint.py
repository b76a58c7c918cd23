"""The fingerprint of a base model: whether an adapter meets the weights it was trained on."""

import functools
import hashlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from .adapter import base_parameters
from .site import QuantisedSite, _site_class

SAMPLES = 256  # values of each tensor at most


def fingerprint(model: nn.Module, without: Iterable[str] = ()) -> str | None:
    """A hash of the base's weights: sha256 over the names, shapes and up to 256 spread values of its tensors.

    Values are rounded to bfloat16, so that one checkpoint loaded in float32 or bfloat16 has one fingerprint. Adapters
    on the model do not count, nor do parameters inside the modules `without` (heads that a file brings along). Of a
    quantised layer the codes are taken, buffers included: a quantised base is another one than the original.
    None where values are out of reach (meta device, weights offloaded to disk): such a base cannot be told.
    """
    prefixes = tuple(f"{path}." for path in without)
    digest = hashlib.sha256()
    for name, tensor in sorted(_tensors(model), key=lambda pair: pair[0]):
        if name.startswith(prefixes):
            continue
        if tensor.is_meta:
            return None
        digest.update(f"{name}{list(tensor.shape)}".encode())
        digest.update(bytes(_sample(tensor).view(torch.uint8).tolist()))
    return digest.hexdigest()


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from base_parameters(model).items()
    for path, module in model.named_modules():
        if issubclass(_site_class(module), QuantisedSite):
            yield from module.named_buffers(path, recurse=False)


def _sample(tensor: Tensor) -> Tensor:
    flat = tensor.detach().reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    values = flat[_places(flat.numel()).to(flat.device)]
    return values.to("cpu", torch.bfloat16 if values.is_floating_point() else values.dtype)


@functools.lru_cache(maxsize=64)
def _places(count: int) -> Tensor:
    """One place in each of up to 256 stretches of equal length, scattered, lest a matrix show few of its columns."""
    step = -(-count // SAMPLES) or 1
    i = torch.arange(count // step)
    return i * step + i * 2654435761 % step
