"""Metrics of answers: functions of the answers given and the right ones, both in the same order. More is better."""

from collections import Counter
from collections.abc import Sequence

LONGEST, BETA = 6, 2  # of chrF: characters of an n-gram; how many times recall weighs precision


def exact_match(said: Sequence[str], right: Sequence[str]) -> float:
    """Share of answers that equal the right one, white space at both ends aside."""
    return sum(s.strip() == r.strip() for s, r in zip(said, right, strict=True)) / len(right)


def accuracy(said: Sequence[str], right: Sequence[str]) -> float:
    """Share of labels that are right."""
    return sum(s == r for s, r in zip(said, right, strict=True)) / len(right)


def chrf(said: Sequence[str], right: Sequence[str]) -> float:
    """chrF2 of the whole corpus, from 0 to 1: (1 + b^2) P R / (b^2 P + R), b = 2.

    P and R are the means over n = 1..6 of the precision and recall of character n-grams, white space removed, counted
    over all answers together. As in sacreBLEU, an answer has no n-grams where the right one is too short for any, and
    an n that one of the two sides has no n-gram of is left out.

    chrF: character n-gram F-score for automatic MT evaluation. Popović, 2015. https://aclanthology.org/W15-3049
    """
    precisions, recalls = [], []
    for n in range(1, LONGEST + 1):
        pairs = [(_ngrams(s, n), _ngrams(r, n)) for s, r in zip(said, right, strict=True)]
        given = sum(s.total() for s, r in pairs if r)
        wanted = sum(r.total() for _, r in pairs)
        if given and wanted:
            shared = sum((s & r).total() for s, r in pairs)
            precisions.append(shared / given)
            recalls.append(shared / wanted)
    p, r = (sum(values) / len(values) if values else 0.0 for values in (precisions, recalls))
    return (1 + BETA**2) * p * r / (BETA**2 * p + r) if p + r else 0.0


def _ngrams(text: str, n: int) -> Counter[str]:
    letters = "".join(text.split())
    return Counter(letters[i : i + n] for i in range(len(letters) - n + 1))
