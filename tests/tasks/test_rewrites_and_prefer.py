"""Rewriting strings, and preferences between answers, against interpreters of the prompt written here."""

import re
from collections import Counter
from functools import cache

import pytest

from graft import tasks
from graft.core.errors import GraftError
from graft.tasks.prefer import distance

KNOBS = [{}, {"depth": 3, "length": 10}, {"rules": 8, "letters": 5, "examples": 200}, {"skew": 1.0}]


def rules_of(prompt):
    return tuple(re.findall(r"((?: \w)+) as((?: \w)+)", prompt))


def solved(prompt):
    """The prompt's answer, on its text as it stands: letters with a space before each."""
    text = prompt.split("=")[1].rstrip()
    for left, right in rules_of(prompt):
        assert left in text  # every rule applies
        text = re.sub(left, right, text, count=1)
    return text


@pytest.mark.parametrize("knobs", KNOBS, ids=str)
def test_completions_follow_from_the_prompts(knobs):
    task = tasks.task("rewrites", **knobs)
    for split in task.splits:
        for row in task.rows(split):
            assert row["completion"] == solved(row["prompt"])
            assert len(row["prompt"].split("=")[1].split()) == task.length
            assert len(rules_of(row["prompt"])) == task.depth + (split == "deeper")


@pytest.mark.parametrize("knobs", KNOBS, ids=str)
def test_rules_are_as_many_as_asked_and_known_where_they_should_be(knobs):
    task = tasks.task("rewrites", **knobs)
    found = {split: {r for row in task.rows(split) for r in rules_of(row["prompt"])} for split in task.splits}
    assert 0.5 * task.rules < len(found["train"]) <= task.rules
    assert not (found["seen"] | found["deeper"]) & (found["validation"] | found["test"])
    assert len(found["train"] | found["seen"] | found["deeper"]) <= task.rules
    prompts = [row["prompt"] for split in task.splits for row in task.rows(split)]
    assert len(set(prompts)) == len(prompts)


def test_skew_gives_rules_the_frequencies_of_zipf():
    task = tasks.task("rewrites", rules=50, skew=1.0, examples=4000)
    counts = [n for _, n in Counter(rules_of(row["prompt"])[0] for row in task.rows("train")).most_common()]
    expected = 4000 / sum(1 / i for i in range(1, 51))
    assert counts[0] == pytest.approx(expected, rel=0.15) and counts[4] == pytest.approx(expected / 5, rel=0.25)
    even = Counter(rules_of(row["prompt"])[0] for row in tasks.load("rewrites", rules=50, examples=4000))
    assert max(even.values()) < 2 * min(even.values())


def test_knobs_that_do_not_go_together_are_refused():
    with pytest.raises(GraftError, match="length=8: instructions of depth=4, and one deeper, need at least 10"):
        tasks.task("rewrites", depth=4)
    with pytest.raises(GraftError, match="rules=5000: letters=4 make 1328 rules"):
        tasks.task("rewrites", rules=5000, letters=4)
    with pytest.raises(GraftError, match="hardly 4096 different instructions of depth 1 with 1 rules"):
        tasks.load("rewrites", rules=1, letters=4, length=4)


@cache
def edits(a, b):
    """The recursive definition of Levenshtein's distance."""
    if not a or not b:
        return len(a) + len(b)
    return min(edits(a[1:], b) + 1, edits(a, b[1:]) + 1, edits(a[1:], b[1:]) + (a[0] != b[0]))


def reward(prompt, answer):
    said, right = answer.replace(" ", ""), solved(prompt).replace(" ", "")
    return 1 - edits(said, right) / max(len(said), len(right))


def test_the_true_reward_is_that_of_the_edit_distance_and_orders_the_pairs():
    task = tasks.task("prefer", examples=300)
    for split in task.splits:
        for row in task.rows(split)[:100]:
            better, worse = (task.reward(row["prompt"], row[k]) for k in ("chosen", "rejected"))
            assert better == pytest.approx(reward(row["prompt"], row["chosen"]))
            assert worse == pytest.approx(reward(row["prompt"], row["rejected"]))
            assert better > worse and not row["flipped"]
    row = task.rows("test")[0]
    assert task.reward(row["prompt"], solved(row["prompt"])) == 1 and task.reward(row["prompt"], "") == 0
    assert distance("kitten", "sitting") == 3


def test_noise_flips_that_share_of_the_train_pairs_and_nothing_else():
    clean, noisy = (tasks.task("prefer", noise=noise) for noise in (0.0, 0.3))
    flipped = [row["flipped"] for row in noisy.rows("train")]
    assert sum(flipped) / len(flipped) == pytest.approx(0.3, abs=0.03)
    for a, b in zip(clean.rows("train"), noisy.rows("train"), strict=True):
        swapped = {"prompt": a["prompt"], "chosen": a["rejected"], "rejected": a["chosen"], "flipped": True}
        assert b == (swapped if b["flipped"] else a)
    assert all(list(clean.rows(s)) == list(noisy.rows(s)) for s in clean.splits if s != "train")


def test_preferences_stand_on_the_instructions_of_rewrites():
    rows = tasks.load("prefer", split="test")
    plain = tasks.load("rewrites", split="test")
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in plain]
    assert [rows.task.answer(row) for row in rows] == [row["completion"] for row in plain]
    assert rows.score([row["chosen"] for row in rows])["reward"] > rows.score([r["rejected"] for r in rows])["reward"]
    mixed = [row["chosen"] if i % 2 else "" for i, row in enumerate(rows)]
    mean = sum(reward(r["prompt"], r["chosen"]) for r in rows[1::2]) / len(rows)
    assert rows.score(mixed)["reward"] == pytest.approx(mean)


def test_answered_examples_before_a_prompt_do_not_change_its_reward():
    task = tasks.task("prefer")
    rows = task.rows("test")[:20]
    shots = "".join(f"{row['prompt']}{row['chosen']}\n\n" for row in task.rows("train")[:3])
    longer = [row | {"prompt": shots + row["prompt"]} for row in rows]
    for answers in ([row["chosen"] for row in rows], [row["rejected"] for row in rows]):
        assert task.score(longer, answers) == task.score(rows, answers)
