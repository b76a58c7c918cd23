"""Scaling laws on planted curves, and the ranking of a pre-trained base beside one of random weights."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graft import GraftError, rank
from graft.cli import run
from graft.models import load_base
from graft.scaling import Rectified, accept_then_stop

SIZES = [200 * 2**i for i in range(12)]


@given(st.floats(0.05, 0.5), st.integers(3, 11), st.floats(0.5, 5.0))
def test_the_line_holds_the_power_phase_and_nothing_of_the_flat_one(slope, power, level):
    noise = 1e-3 * (-1.0) ** np.arange(12)
    flat = 12 - power  # the smallest sizes, as bad as the first size of the power phase and a little worse
    losses = level * np.exp(-slope * np.log(np.maximum(SIZES, SIZES[flat])) + noise)
    losses[:flat] *= 1 - 0.1 * slope
    line = accept_then_stop(SIZES, losses)
    assert line.accepted == power
    assert line.slope == pytest.approx(-slope, abs=5e-3)
    assert line(10 * SIZES[-1]) == pytest.approx(level * (10 * SIZES[-1]) ** -slope, rel=0.02)


def test_the_order_of_the_sizes_does_not_matter():
    losses = [3.0 * n**-0.3 + 0.01 * (i % 3) for i, n in enumerate(SIZES)]
    assert accept_then_stop(SIZES, losses) == accept_then_stop(SIZES[::-1], losses[::-1])


@pytest.mark.parametrize("planted", [Rectified(300.0, 80.0, 0.6, 0.7), Rectified(40.0, 12.0, 0.4, 1.5)])
def test_the_rectified_law_foretells_what_the_plain_one_cannot(planted):
    losses = planted(np.array(SIZES))
    found, plain = (Rectified.fit(SIZES, losses, plain=p) for p in (False, True))
    np.testing.assert_allclose(found(np.array(SIZES)), losses, rtol=1e-3)
    far = 16 * SIZES[-1]
    assert abs(found(far) / planted(far) - 1) < 0.02
    assert np.abs(plain(np.array(SIZES)) / losses - 1).max() > 0.01


def test_laws_refuse_what_they_cannot_fit():
    with pytest.raises(GraftError, match="needs 4 sizes"):
        Rectified.fit([1, 2, 3], [3.0, 2.0, 1.0])
    with pytest.raises(GraftError, match="above 0"):
        accept_then_stop([1, 2, 4], [1.0, 0.0, 1.0])


def test_a_trained_base_ranks_above_its_random_twin(tmp_path, capsys):
    base = load_base("graft:sprout")
    torch.manual_seed(0)
    for parameter in base.model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    base.model.save_pretrained(tmp_path / "random")
    base.processor.save_pretrained(tmp_path / "random")
    options = {"rows": 64, "least": 16, "epochs": 2, "learning_rates": [0.003], "output": tmp_path / "out"}
    found = rank([str(tmp_path / "random"), "graft:sprout"], "task:digits", **options)
    assert [r.base for r in found] == ["graft:sprout", str(tmp_path / "random")]
    assert [sorted(r.measured) for r in found] == [[16, 32, 64]] * 2
    assert found[0].foretold < found[1].foretold
    assert found[0].measured[64] < found[1].measured[64]
    command = ["rank", "graft:sprout", "--data", "task:digits", "--rows", "64", "--least", "16", "--epochs", "2"]
    assert run([*command, "--learning-rates", "0.003", "--output", str(tmp_path / "out"), "--json"]) == 0
    (again,) = json.loads(capsys.readouterr().out)
    assert again["foretold"] == found[0].foretold  # the records were there


def test_sizes_that_cannot_make_a_line_are_refused(tmp_path):
    with pytest.raises(GraftError, match="rows=64 and least=32 leave 2 sizes, and a line needs 3: 128 rows would do"):
        rank(["graft:sprout"], "task:digits", rows=64, output=tmp_path)
    with pytest.raises(GraftError, match="the train split has"):
        rank(["graft:sprout"], "task:digits", rows=10**6, output=tmp_path)
    with pytest.raises(GraftError, match="name at least one base"):
        rank([], "task:digits", output=tmp_path)
