"""Random numbers that are the same on every machine and with every version of torch.

torch promises no such thing of its generators. What is not saved but drawn again from a seed comes from here: whole
numbers by splitmix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014), in exact arithmetic,
and one rounded product. While deltas are built, torch.initial_seed() is the seed of their adapter.
"""

import math

import torch
from torch import Tensor


def uniform(shape: tuple[int, ...], bound: float, seed: int, stream: int) -> Tensor:
    """float32 numbers between -bound and bound; another `stream` of the same seed is independent of it."""
    odd = 2 * _shifted(_words(0, math.prod(shape), seed, stream), 40) + 1 - 2**24  # whole, which float32 holds exactly
    return (odd.to(torch.float32) * 2**-24 * bound).view(shape)


def subset(count: int, size: int, seed: int, stream: int) -> Tensor:
    """`count` different whole numbers from 0 to `size` - 1, rising; all sets of so many are equally likely."""
    few, done = min(count, size - count), 0  # of more than half those are drawn that are left out
    found = torch.zeros(0, dtype=torch.long)
    while (lacking := few - len(found)) > 0:
        new = _shifted(_words(done, lacking, seed, stream), 1) % size
        found, done = torch.cat([found, new]).unique(), done + lacking
    return found if few == count else torch.ones(size, dtype=torch.bool).index_fill_(0, found, False).nonzero()[:, 0]


def _words(first: int, count: int, seed: int, stream: int) -> Tensor:
    """Random words of 64 bits, numbers first to first + count - 1 of the stream, as int64."""
    start = _mixed(_mixed(torch.tensor([_signed(seed)])) + stream)
    return _mixed(start + torch.arange(first + 1, first + count + 1) * _signed(0x9E3779B97F4A7C15))


def _mixed(z: Tensor) -> Tensor:
    """The finaliser of splitmix64."""
    z = (z ^ _shifted(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shifted(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, by: int) -> Tensor:
    """z >> by of unsigned 64 bits."""
    return (z >> by) & ((1 << (64 - by)) - 1)


def _signed(value: int) -> int:
    """The int64 with the bits of an unsigned one."""
    value %= 1 << 64
    return value - (1 << 64) if value >= 1 << 63 else value
