"""Numbers drawn by exact arithmetic: splitmix64 in Python's whole numbers, and what a uniform distribution has."""

import itertools
from collections import Counter

import torch
from hypothesis import given
from hypothesis import strategies as st

from graft.core.drawn import subset, uniform

MASK = (1 << 64) - 1


def mixed(z):
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
    return z ^ (z >> 31)


def words(seed, stream):
    start = mixed((mixed(seed) + stream) & MASK)
    return (mixed((start + i * 0x9E3779B97F4A7C15) & MASK) for i in itertools.count(1))


@given(st.integers(0, MASK), st.integers(0, 9), st.integers(1, 9))
def test_is_splitmix64(seed, stream, count):
    expect = [(2 * (word >> 40) + 1) / 2**24 - 1 for word in itertools.islice(words(seed, stream), count)]
    found = uniform((count,), 1.0, seed, stream)
    assert found.dtype == torch.float32 and found.tolist() == expect


def test_is_uniform_and_streams_are_independent():
    a, b = (uniform((300, 200), 3.0, 7, stream).double().flatten() for stream in (0, 1))
    for x in (a, b):
        assert x.abs().max() < 3 and abs(x.mean()) < 0.05
        torch.testing.assert_close(x.square().mean().item(), 3.0, rtol=0.03, atol=0)
        assert torch.histc(x, 10, -3, 3).sub(6000).abs().max() < 400
    assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 0.02
    assert abs(torch.corrcoef(torch.stack([a[1:], a[:-1]]))[0, 1]) < 0.02


@given(st.integers(0, MASK), st.integers(0, 2**32), st.integers(0, 60), st.data())
def test_a_subset_is_the_first_different_words_or_leaves_them_out(seed, stream, size, data):
    count = data.draw(st.integers(0, size))
    drawn: set[int] = set()
    for word in words(seed, stream):
        if len(drawn) == min(count, size - count):
            break
        drawn.add((word >> 1) % size)
    expect = sorted(drawn if len(drawn) == count else {*range(size)} - drawn)
    assert subset(count, size, seed, stream).tolist() == expect


def test_subsets_are_equally_likely():
    for count in (2, 3):
        seen = Counter(tuple(subset(count, 5, seed, 1).tolist()) for seed in range(2000))
        assert len(seen) == 10
        assert sum((n - 200) ** 2 / 200 for n in seen.values()) < 9 + 4 * 18**0.5  # chi squared, nine degrees
