"""Metrics, against values worked out by hand and sacreBLEU."""

import random

import pytest

from graft.tasks.metrics import accuracy, chrf, exact_match


def test_exact_match_and_accuracy():
    assert exact_match([" a\n", "b", "A"], ["a", "c", "a"]) == pytest.approx(1 / 3)
    assert accuracy(["a", " b", "c"], ["a", "b", "c"]) == pytest.approx(2 / 3)
    with pytest.raises(ValueError):
        exact_match(["a"], ["a", "b"])


def test_chrf_by_hand():
    # "abc" for "abd": 2 of 3 letters, 1 of 2 pairs, 0 of 1 triple; precision is recall, longer n-grams do not count.
    assert chrf(["abc"], ["abd"]) == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    # "ab" for "abcd": precision 1, 1; recall 2/4, 1/3; b = 2.
    p, r = 1, (2 / 4 + 1 / 3) / 2
    assert chrf(["a b"], ["abcd"]) == pytest.approx(5 * p * r / (4 * p + r))
    assert chrf(["abc"], ["xyz"]) == chrf([""], ["xyz"]) == 0


def test_chrf_has_the_values_of_sacrebleu():
    # sacrebleu 2.6.0: CHRF().corpus_score(said, [right]).score / 100
    assert chrf(["copy_tree"], ["copytree"]) == pytest.approx(0.4731585031815279, abs=1e-12)
    assert chrf(["get", "close_all"], ["get_name", "close"]) == pytest.approx(0.4259406649193969, abs=1e-12)


def test_chrf_is_that_of_sacrebleu_on_any_texts():
    reference = pytest.importorskip("sacrebleu.metrics").CHRF()
    draw = random.Random(0)
    for _ in range(300):
        said, right = (["".join(draw.choices("abc d_", k=draw.randint(0, 12))) for _ in range(4)] for _ in range(2))
        assert chrf(said, right) == pytest.approx(reference.corpus_score(said, [right]).score / 100, abs=1e-12)
