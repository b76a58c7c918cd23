"""What records say: who beats which control, who lies on a front, when the target was reached."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graft.comparison import outcome
from graft.runs.summary import difference, summarise

VALUES = {
    "no-op": [0.10, 0.10, 0.10],
    "zero-shot": [0.10],
    "full-fine-tuning": [0.60, 0.62, 0.61],
    "lora": [0.59, 0.63, 0.60],
    "ia3": [0.30, 0.31, 0.29],
    "bitfit": [0.08, 0.12, 0.11],
}


def table(some, *args, target=None):
    return {r["method"]: r for r in outcome.rows(summarise(some(*args)), target)}


def test_a_method_is_marked_with_every_control_that_it_is_not_shown_to_beat(some):
    found = table(some, VALUES)
    assert found["lora"]["not_above"] == ["full-fine-tuning"] and found["ia3"]["not_above"] == ["full-fine-tuning"]
    assert set(found["bitfit"]["not_above"]) == {"no-op", "zero-shot", "full-fine-tuning"}
    assert difference(VALUES["bitfit"], VALUES["no-op"])[0] < 0 < difference(VALUES["ia3"], VALUES["no-op"])[0]
    assert {name for name, r in found.items() if r["tie"]} == {"lora", "full-fine-tuning"}
    assert {name for name, r in found.items() if r["control"]} == {"no-op", "zero-shot", "full-fine-tuning"}


def test_one_seed_shows_nothing(some):
    found = table(some, {name: of[:1] for name, of in VALUES.items()})
    assert len(found["lora"]["not_above"]) == 3 and found["bitfit"]["tie"]


ROW = st.tuples(st.sampled_from([0.0, 0.5, 1.0]) | st.none(), st.sampled_from([1, 2, 3]) | st.none())


@settings(deadline=None)
@given(st.lists(ROW, max_size=8))
def test_a_front_holds_what_nothing_dominates(pairs):
    made = [{"quality": q, **dict.fromkeys(outcome.COSTS), "parameters": c} for q, c in pairs]
    known = [(q, c) for q, c in pairs if q is not None and c is not None]
    for (q, c), fronts in zip(pairs, outcome.fronts_of(made)):
        best = q is not None and c is not None and not any(
            (a > q and b <= c) or (a >= q and b < c) for a, b in known
        )  # fmt: skip
        assert fronts == (["parameters"] if best else [])


def test_the_time_to_the_target_is_that_of_the_first_point_at_or_below_it(some):
    curves = {"full-fine-tuning": [[2, 1.0, 3.0], [4, 2.0, 1.0]], "lora": [[2, 3.0, 1.0], [4, 6.0, 0.5]],
              "ia3": [[2, 1.0, 3.0], [4, 2.0, 2.0]]}  # fmt: skip
    figures = {name: {"validation": curve} for name, curve in curves.items()}
    found = table(some, VALUES, figures, target=1.0)
    assert [found[name]["time_to_target"] for name in ("full-fine-tuning", "lora", "ia3", "no-op")] == [
        2,
        3,
        None,
        None,
    ]
    assert found["lora"]["reached"] == 3 and found["ia3"]["reached"] == 0
    ended = [outcome.end_of(summarise(some(*given))) for given in ((VALUES, figures), (VALUES,))]
    assert ended == [1.0, None]


def test_forgetting_is_counted_from_the_base(some):
    figures = {"no-op": {"forgetting": 2.0}, "lora": {"forgetting": 2.5}}
    found = table(some, VALUES, figures)
    assert (
        found["lora"]["forgetting"] == 0.5 and found["no-op"]["forgetting"] == 0 and found["ia3"]["forgetting"] is None
    )


def test_the_rank_correlation_is_one_where_the_loss_falls_as_the_metric_rises(some):
    found = outcome.predicts(summarise(some(VALUES)))
    assert found == {"metric": "exact_match", "runs": 16, "rank_correlation": pytest.approx(1.0)}
    assert outcome.predicts(summarise(some({"lora": [0.5, 0.5, 0.5]}))) is None
