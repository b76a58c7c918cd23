import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graft.core.errors import GraftError
from graft.training import schedules

FRACTION = st.floats(0, 1, exclude_max=True)


@given(st.sampled_from(sorted(schedules.SCHEDULES)), st.floats(0, 1), FRACTION)
def test_factors_lie_between_0_and_1_and_fall_after_the_warmup(name, progress, warmup):
    schedule = schedules.SCHEDULES[name]
    factor = schedule(progress, warmup)
    assert -1e-9 <= factor <= 1 + 1e-9
    if progress < warmup:
        assert factor == progress / warmup
    else:
        assert schedule(min(1.0, progress + 0.01), warmup) <= factor + 1e-9


@pytest.mark.parametrize("name", ["linear", "cosine", "constant"])
def test_agrees_with_transformers(name):
    from transformers import get_scheduler

    total, warm = 40, 8
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_scheduler(
        "constant_with_warmup" if name == "constant" else name, optimizer, num_warmup_steps=warm,
        num_training_steps=total,
    )  # fmt: skip
    for step in range(total):
        assert schedules.schedule(name)(step / total, warm / total) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()


def test_wsd_is_constant_then_halves_again_and_again():
    start = 1 - schedules.DECAY
    assert all(schedules.wsd(p, 0.05) == 1 for p in (0.05, 0.4, start))
    assert schedules.wsd(1.0, 0.05) == pytest.approx(schedules.FLOOR)
    half_life = schedules.DECAY / math.log2(1 / schedules.FLOOR)
    for p in (start, start + 0.02, start + 0.05):
        assert schedules.wsd(p + half_life) == pytest.approx(schedules.wsd(p) / 2)


def test_an_unknown_schedule_names_the_near_miss():
    with pytest.raises(GraftError, match="'cosin': did you mean cosine"):
        schedules.schedule("cosin")
