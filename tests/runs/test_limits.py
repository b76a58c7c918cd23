"""What cannot keep within the limits is told before it is started."""

from dataclasses import replace

import pytest

from graft.core.errors import GraftError
from graft.runs.configuration import Configuration
from graft.runs.limits import misfit, size
from graft.runs.single import perform


@pytest.fixture
def run(bases):
    def made(method, **options):
        return Configuration(
            base=str(bases / "llama"), task="rewrites", method=method, options=options, train_rows=16, rows=2,
            training={"steps": 2, "batch_size": 2},
        )  # fmt: skip

    return made


def test_a_run_that_would_take_too_much_has_a_reason(run):
    assert misfit(run("lora"), memory=2**30, parameters=10**6) is None
    assert "not started: it would take" in str(misfit(run("lora"), memory=2**10))
    assert "0.0 MiB are allowed" in str(misfit(run("full-fine-tuning"), memory=2**10))
    assert misfit(run("zero-shot"), memory=1) is None
    assert str(misfit(run("bitfit"), memory=2**30)).startswith("not started: bitfit cannot work at")


def test_nothing_is_foretold_of_a_quantised_base(run):
    with pytest.raises(GraftError, match="on a base quantised by int8 is not known before: leave the limit out"):
        misfit(replace(run("lora"), quantise="int8"), memory=2**30)


def test_the_parameters_are_those_of_the_run(run):
    trained = perform(run("lora", rank=2)).parameters
    assert misfit(run("lora", rank=2), parameters=trained) is None
    said = f"it would train {trained:,} parameters, and {trained - 1:,} are allowed"
    assert misfit(run("lora", rank=2), parameters=trained - 1) == f"not started: {said}"


def test_sizes_are_read_with_their_units():
    assert size("2GiB") == 2**31 and size("1.5 MiB") == 3 * 2**19 and size("64MB") == 64 * 10**6
    for text in ("much", "2 gallons", "0MiB", "-1MiB"):
        with pytest.raises(GraftError, match="is no size"):
            size(text)
