"""Options and recipes from signatures."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graft.cli._settings import documented, load_yaml, settings, split
from graft.core.errors import GraftError
from graft.training import fit
from graft.tuning import tune

FIT = {s.name: s for s in settings(fit, "Training")}
TUNE = {s.name: s for s in settings(tune, "Model")}


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("learning_rate", "1e-4", 1e-4),
        ("learning_rate", "3", 3),
        ("steps", "7", 7),
        ("clip", "none", None),
        ("schedule", "cosine", "cosine"),
        ("validation", "0.1", 0.1),
        ("validation", "0.1.jsonl", "0.1.jsonl"),
        ("labels", "no,yes", ["no", "yes"]),
        ("labels", "one", ["one"]),
        ("trackers", "tensorboard", ["tensorboard"]),
        ("columns", "text=body,label=class", {"text": "body", "label": "class"}),
        ("optimizer_options", "betas=[0.9, 0.99],eps=1e-6", {"betas": [0.9, 0.99], "eps": 1e-6}),
        ("optimizer_options", "{eps: 1e-6}", {"eps": 1e-6}),
    ],
)
def test_a_text_becomes_the_value_that_fits(name, text, value):
    read = FIT[name].read(text)
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("qv", "qv"),
        ("q_proj,v_proj", ["q_proj", "v_proj"]),
        (r"layers\.[0-9]{1,2}\.mlp", r"layers\.[0-9]{1,2}\.mlp"),
        (r"layers\.(0|1),qv", [r"layers\.(0|1)", "qv"]),
        ("bitfit=norms in blocks[4:],lora=qv", {"bitfit": "norms in blocks[4:]", "lora": "qv"}),
        (r"(?=.*q)\w+", r"(?=.*q)\w+"),
    ],
)
def test_targets_may_be_listed_with_commas(text, value):
    assert TUNE["targets"].read(text) == value


@pytest.mark.parametrize(("name", "text"), [("steps", "1.5"), ("epochs", "true"), ("learning_rate", "fast"),
                                            ("seed", "[1]"), ("columns", "text")])  # fmt: skip
def test_a_text_that_does_not_fit_is_refused_with_its_name(name, text):
    with pytest.raises(GraftError, match=f"{name} must be"):
        FIT[name].read(text)


@pytest.mark.parametrize("text", ["", " ", "a,", "a,,b"])
def test_nothing_between_commas_is_refused(text):
    with pytest.raises(GraftError, match=f"^labels='{text}' has an empty entry"):
        FIT["labels"].read(text)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_number_survives_being_written(x):
    assert FIT["learning_rate"].read(repr(x)) == x
    assert load_yaml(repr(x)) == x


@given(st.one_of(st.booleans(), st.none(), st.integers(), st.text("abcyesno-_. ", min_size=1)))
def test_a_recipe_keeps_values(x):
    import yaml

    from graft.cli._settings import write_recipe  # noqa: F401

    assert load_yaml(yaml.safe_dump({"key": x}), whole=True) == {"key": x}


@given(st.lists(st.text("abc.*|", min_size=1), min_size=1))
def test_commas_inside_brackets_do_not_divide(parts):
    assert split(",".join(f"({p},{p})" for p in parts)) == [f"({p},{p})" for p in parts]


@pytest.mark.parametrize("function", [fit, tune])
def test_docstrings_explain_every_argument(function):
    explained = documented(function)
    assert not [s.name for s in settings(function, "") if not explained.get(s.name)]
