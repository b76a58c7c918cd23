"""The rule by which a rate is chosen, and tables that say what the records say."""

import json
import random
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up import configuration, record

from graft.core.errors import GraftError
from graft.runs.contestants import Contestant, title
from graft.runs.reference import final
from graft.runs.summary import choose, difference, measured, summarise, ties

RATES = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2]
RUN = st.tuples(
    st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([0.5, 1.0, float("inf"), float("nan")]), st.booleans()
)


def tried(runs):
    """A record for each (exact match, loss, whether it failed), in no order."""
    made = [
        record(rate, match, loss, reason="it diverged" if failed else None)
        for rate, (match, loss, failed) in zip(RATES, runs)
    ]
    return random.Random(0).sample(made, len(made))


@settings(deadline=None)
@given(st.lists(RUN, min_size=1, max_size=5))
def test_the_chosen_rate_is_the_best_by_metric_then_loss_then_the_lowest(runs):
    usable = [
        (match, -loss, -rate)
        for rate, (match, loss, failed) in zip(RATES, runs)
        if not failed and loss == loss
    ]  # fmt: skip
    chosen = choose(tried(runs))
    if not usable:
        assert chosen is None
    else:
        assert chosen.configuration.training["learning_rate"] == -max(usable)[2]


def test_without_a_metric_the_loss_decides():
    records = [record(rate, loss=loss, task="code") for rate, loss in zip(RATES, [3.0, 1.0, 2.0])]
    for r in records:
        del r.metrics["validation"]["exact_match"]
    assert choose(records).configuration.training["learning_rate"] == 3e-4


@settings(deadline=None)
@given(st.lists(RUN, min_size=1, max_size=5))
def test_a_rate_is_marked_where_no_other_was_tried_beyond(runs):
    (found,) = summarise(tried(runs))
    ends = {RATES[0], RATES[len(runs) - 1]} if len(runs) > 1 else set()
    assert found.at_end == (found.rate in ends)
    assert found.row()["learning_rates"] == RATES[: len(runs)]
    assert found.failures == ({"it diverged": n} if (n := sum(failed for *_, failed in runs)) else {})


def test_the_final_runs_are_those_of_the_chosen_rate_one_a_seed():
    chosen = configuration(3e-3)
    runs = final(chosen, (0, 4, 2))
    assert [r.seed for r in runs] == [0, 4, 2] and {r.splits for r in runs} == {("validation", "test")}
    assert {r.training["learning_rate"] for r in runs} == {3e-3}
    assert len(final(configuration(None, method="zero-shot"), (0, 1, 2))) == 1


def test_a_row_holds_what_the_records_say():
    values = [0.25, 0.5, 0.375]
    records = [record(1e-3, 0.4), record(1e-2, 0.6), record(1e-1, reason="it diverged")]
    records += [record(1e-2, 0.6, loss=v, test=v, seed=seed) for seed, v in enumerate(values)]
    records += [record(1e-3, test=1.0, seed=9)]  # at a rate that is not the chosen one
    records += [record(1e-2, test=0.75, method="dora", seed=0), record(1e-2, 0.6, method="dora")]
    lora, dora = (s.row() for s in summarise(records))
    assert lora["seeds"] == [0, 1, 2] and lora["learning_rate"] == 1e-2 and not lora["at_end_of_grid"]
    for metric in measured(records[0].configuration):
        assert lora["test"][metric]["mean"] == pytest.approx(statistics.fmean(values))
        assert lora["test"][metric]["sd"] == pytest.approx(statistics.stdev(values))
    assert dora["test"]["exact_match"] == {"mean": 0.75, "sd": None}
    assert (lora["parameters"], lora["training"], lora["step"], lora["peak_memory"]) == (10, 2.0, 0.5, 1000)
    json.dumps([lora, dora])


def test_other_settings_are_other_rows():
    records = [record(), record(base="other"), record(knobs={"seed": 1}), record(data="d"), record(options={"rank": 2})]
    assert len(summarise(records)) == len(records)
    assert len(summarise([record(), record(1e-2), record(seed=1, test=0.5)])) == 1


@settings(deadline=None)
@given(*(st.lists(st.integers(0, 100).map(lambda i: i / 100), min_size=2, max_size=6),) * 2)
def test_the_interval_is_that_of_scipy(a, b):
    from scipy.stats import ttest_ind

    if len({*a}) == 1 or len({*b}) == 1:
        return
    low, high = difference(a, b)
    expected = ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    assert (low, high) == pytest.approx((expected.low, expected.high))


def test_what_cannot_be_told_from_the_best_is_marked():
    tests = {"lora": [0.9, 0.8, 0.85], "dora": [0.8, 0.9, 0.75], "ia3": [0.1, 0.11, 0.12], "bitfit": []}
    records = [record(1e-3, method=m, **({} if v else {"reason": "no biases"})) for m, v in tests.items()]
    records += [record(1e-3, loss=1 - v, test=v, method=m, seed=i) for m, of in tests.items() for i, v in enumerate(of)]
    records += [record(None, method="zero-shot"), record(None, test=0.0, loss=1.0, method="zero-shot")]
    found = summarise(records)
    for metric in ("exact_match", "loss"):
        assert ties(found, metric) == [True, True, False, False, False]


def test_contestants_are_written_as_they_are_read():
    for text in ("lora", "lora(rank=16)", "lora(rank=4, alpha=2.0)", "zero-shot", "linear-probe"):
        made = Contestant.of(text)
        assert title(made.method, made.options) == text
    assert Contestant.of("lora").options == Contestant.of("lora(rank=8)").options
    for text, said in {
        "lorra": "did you mean lora", "lora(rnk=4)": "did you mean rank", "zero-shoot": "did you mean zero-shot",
        "lora(rank=0)": "rank must be", "lora(rank)": "no option with a value", "lora(": "names no method",
        "zero-shot(a=1)": "no options",
    }.items():  # fmt: skip
        with pytest.raises(GraftError, match=said):
            Contestant.of(text)
