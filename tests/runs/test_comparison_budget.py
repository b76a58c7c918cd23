"""As many steps as fit, not one more, and a sentence where nothing fits."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graft.comparison import budget
from graft.comparison.budget import Cost
from graft.core.errors import GraftError

COSTS = st.lists(st.builds(Cost, st.floats(0, 20), st.floats(0.001, 1), st.integers(1, 9)), min_size=1, max_size=5)


@given(COSTS, st.floats(1, 10_000))
def test_all_runs_fit_with_so_many_steps_and_not_with_one_more(costs, available):
    count = budget.steps(costs, available)
    if count:
        assert budget.needed(costs, count) <= available * (1 + 1e-9)
    assert budget.needed(costs, count + 1) > available * (1 - 1e-9)
    assert budget.steps(costs, available, 5) == min(count, 5)


def test_times_are_read_and_written_and_what_is_none_is_refused():
    assert [budget.seconds(text) for text in ("90s", "20m", "1.5h")] == [90, 1200, 5400]
    for text in ("20", "m", "0s", "-1m", "2 days"):
        with pytest.raises(GraftError, match="is no time: write 90s, 20m or 2h"):
            budget.seconds(text)


@given(st.floats(0.1, 10**6))
def test_a_time_in_words_is_enough(duration):
    assert duration <= budget.seconds(budget.words(duration)) <= 1.2 * duration + 61
