from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graft.training.batches import Plan, pack

LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=300)


@given(LENGTHS, st.integers(1, 9), st.integers(0, 5), st.booleans())
def test_every_example_once_an_epoch(lengths, size, seed, grouped):
    plan = Plan(lengths, size, seed=seed, grouped=grouped)
    batches = plan.epoch(3)
    assert sorted(i for b in batches for i in b) == list(range(len(lengths)))
    assert len(batches) == -(-len(lengths) // size) and all(len(b) <= size for b in batches)


@given(LENGTHS, st.integers(1, 4), st.integers(1, 3), st.integers(0, 20), st.integers(1, 3))
def test_a_stream_from_any_step_is_the_rest_of_the_whole_stream(lengths, size, accumulation, start, processes):
    plan = Plan(lengths, size, seed=1)
    for process in range(processes):
        whole = list(islice(plan.stream(0, accumulation, process, processes), start + 5))
        assert list(islice(plan.stream(start, accumulation, process, processes), 5)) == whole[start:]


@given(LENGTHS, st.integers(1, 4), st.integers(1, 3), st.integers(1, 4))
def test_processes_share_an_epoch_evenly_and_leave_nothing_out(lengths, size, accumulation, processes):
    plan = Plan(lengths, size)
    shares = [
        list(islice(plan.stream(0, accumulation, p, processes), plan.steps(accumulation, processes)))
        for p in range(processes)
    ]
    assert {i for share in shares for step in share for batch in step for i in batch} == set(range(len(lengths)))
    assert len({tuple(map(len, share)) for share in shares}) == 1  # the same number of batches at every step
    assert all(step for share in shares for step in share)


def test_order_changes_with_seed_and_epoch_and_with_nothing_else():
    lengths = list(range(100))
    first = Plan(lengths, 4, seed=0).epoch(0)
    np.random.seed(9)
    assert Plan(lengths, 4, seed=0).epoch(0) == first
    assert Plan(lengths, 4, seed=1).epoch(0) != first
    assert Plan(lengths, 4, seed=0).epoch(1) != first


def test_grouping_saves_most_of_the_padding_and_mixes_lengths_over_the_epoch():
    lengths = np.random.default_rng(0).integers(1, 200, 2000).tolist()

    def padding(batches):
        return sum(max(lengths[i] for i in b) * len(b) - sum(lengths[i] for i in b) for b in batches)

    grouped = Plan(lengths, 8).epoch(0)
    assert padding(grouped) < 0.1 * padding(Plan(lengths, 8, grouped=False).epoch(0))
    longest = [max(lengths[i] for i in b) for b in grouped]
    assert abs(np.corrcoef(range(len(longest)), longest)[0, 1]) < 0.2


@given(st.lists(st.integers(1, 64), min_size=1, max_size=200))
def test_packs_hold_everything_within_their_capacity(lengths):
    bins = pack(lengths, 64)
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in b) <= 64 for b in bins)
    fill = sorted(sum(lengths[i] for i in b) for b in bins)
    assert len(fill) < 2 or fill[0] + fill[1] > 64  # no two could have been one


@pytest.mark.parametrize("lengths,bins", [([5, 5, 5, 5], 2), ([7, 3, 6, 4], 2), ([10], 1), ([9, 8, 2, 1], 2)])
def test_packs_are_the_fewest_where_one_sees_it(lengths, bins):
    assert len(pack(lengths, 10)) == bins
