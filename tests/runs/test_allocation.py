"""The best of each compute, extended: on planted laws in closed form, and on runs of a trained and a random base."""

import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graft import GraftError, allocate
from graft.cli import run
from graft.comparison import task_of
from graft.models import load_base
from graft.runs import contestants
from graft.runs.limits import cost
from graft.runs.reference import tuning
from graft.scaling import frontier


@settings(max_examples=50, deadline=None)
@given(st.floats(0.1, 0.6), st.floats(0.1, 0.6), st.floats(0.5, 50.0), st.sampled_from([2.0, 4.0, 6.0]))
def test_the_frontier_of_a_law_of_size_and_data_is_known_in_closed_form(a, b, ratio, per_token):
    """L = A / N^a + B / D^b with C = k N D is least at N = G (C / k)^(b / (a + b)), G = (a A / (b B))^(1 / (a + b))."""
    B, compute = 100.0, [1e12, 2e12, 4e12]
    A, G = ratio * B, (a * ratio / b) ** (1 / (a + b))

    def law(C, N):
        return A / N**a + B / (C / (per_token * N)) ** b

    def best(C):
        return G * (C / per_token) ** (b / (a + b))

    sizes = np.geomspace(best(compute[0]) / 10, best(compute[-1]) * 10, 1000)
    runs = [(C, N, law(C, N)) for C in compute for N in sizes]
    found, far = frontier(*zip(*runs)), 16 * compute[-1]
    assert found.size.slope == pytest.approx(b / (a + b), abs=0.02)
    assert found.loss.slope == pytest.approx(-a * b / (a + b), abs=1e-4)
    assert found.loss(far) == pytest.approx(law(far, best(far)), rel=1e-3)
    assert found.size(far) == pytest.approx(best(far), rel=0.1)


def test_a_frontier_needs_two_computes():
    with pytest.raises(GraftError, match="needs 2 sizes"):
        frontier([1e9, 1e9], [10, 20], [1.0, 0.9])


def test_compute_becomes_steps_and_the_better_base_of_a_size_is_taken(bases, here, reviews, tmp_path, capsys):
    shutil.copytree(bases / "bert", tmp_path / "twin")
    twin = load_base(tmp_path / "twin").model
    torch.manual_seed(1)
    for parameter in twin.parameters():
        torch.nn.init.normal_(parameter)
    twin.save_pretrained(tmp_path / "twin")
    models, folder = [str(bases / "bert"), str(tmp_path / "twin")], tmp_path / "out"
    options = {"methods": ["lora(rank=2)", "full-fine-tuning"], "learning_rates": [0.003, 0.01], "batch_size": 2}
    with pytest.raises(GraftError, match=r"compute=1e\+06 is too small: .* would do"):
        allocate(models, reviews, compute=1e6, output=folder, **options)
    assert not here
    step = {m: cost(tuning(task_of(reviews, folder, {}), method=[m], base=models[0], batch_size=2)[0][0]).flops
            for m in options["methods"]}  # fmt: skip
    compute = 16 * 8 * step["lora(rank=2)"]  # all three runs of lora, two of full fine-tuning, which costs more
    assert step["lora(rank=2)"] < step["full-fine-tuning"] < 2 * step["lora(rank=2)"]
    found = {a.method: a for a in allocate(models, reviews, compute=compute, output=folder, **options)}
    made = [(contestants.title(c.method, c.options), c.base, c.training["steps"]) for c in here]
    for method, one in found.items():
        assert one.steps == int(compute / step[method])
        steps = [n for s in (4, 8, 16) if (n := int(compute / s / step[method])) >= 8]
        tried = [steps[0], *steps]  # two rates with the most compute
        for base in models:
            assert sorted(n for m, b, n in made if (m, b) == (method, base)) == sorted(tried)
        assert [*one.measured] == [compute / s for s in (4, 8, 16)][: len(steps)]
        assert one.base == one.measured[compute / 4][0]
        assert one.foretold == one.frontier.loss(compute)
    command = ["allocate", *models, "--data", str(reviews), "--compute", str(compute), "--batch-size", "2", "--json"]
    command += ["--methods", "lora(rank=2),full-fine-tuning", "--learning-rates", "0.003,0.01", "--output", str(folder)]
    assert run(command) == 0
    again = json.loads(capsys.readouterr().out)
    assert {a["method"]: a["foretold"] for a in again} == {m: a.foretold for m, a in found.items()}
    assert len(here) == len(made)  # the records were there


def test_what_is_not_named_is_refused(tmp_path):
    with pytest.raises(GraftError, match="name at least one base"):
        allocate([], "task:digits", compute=1e12, output=tmp_path)
    with pytest.raises(GraftError, match="name at least one method"):
        allocate(["graft:sprout"], "task:digits", methods=[], compute=1e12, output=tmp_path)
