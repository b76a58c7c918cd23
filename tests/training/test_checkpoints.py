import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graft.core.errors import GraftError
from graft.training import checkpoints

TENSORS = st.sampled_from(
    [torch.arange(6).reshape(2, 3), torch.randn(3).bfloat16(), torch.tensor(2.5), torch.zeros(0), torch.eye(3).t()[1:]]
)
PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
KEYS = st.text() | st.integers() | st.tuples(st.integers(), st.text())
TREES = st.recursive(
    PLAIN | TENSORS,
    lambda t: st.lists(t, max_size=4) | st.tuples(t, t) | st.dictionaries(KEYS, t, max_size=4),
    max_leaves=12,
)


def equal(a, b):
    if torch.is_tensor(a):
        return torch.is_tensor(b) and a.dtype == b.dtype and torch.equal(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


@settings(max_examples=30)
@given(tree=TREES)
def test_any_state_comes_back_as_it_was(tree, tmp_path_factory):
    folder = tmp_path_factory.mktemp("state")
    checkpoints.save(folder, 7, tree)
    step, found = checkpoints.newest(folder)
    assert step == 7 and equal(tree, found)


def test_the_layout_of_a_tensor_comes_back(tmp_path):
    images = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    state = [torch.randn(4, 6).T, images, torch.randn(2, 3, 4).permute(1, 2, 0), torch.randn(3, 1, 2).expand(3, 4, 2)]
    checkpoints.save(tmp_path, 1, state)
    _, found = checkpoints.newest(tmp_path)
    for before, after in zip(state[:3], found):
        assert torch.equal(before, after) and before.stride() == after.stride()
    assert torch.equal(found[3], state[3])


def test_tensors_that_share_memory_are_saved_one_by_one(tmp_path):
    whole = torch.arange(6.0)
    checkpoints.save(tmp_path, 1, {"a": whole, "b": whole[2:4], "c": whole})
    found = checkpoints.newest(tmp_path)[1]
    assert torch.equal(found["a"], whole) and torch.equal(found["b"], whole[2:4])


def test_what_a_checkpoint_cannot_hold_is_refused_and_leaves_nothing(tmp_path):
    with pytest.raises(GraftError, match="a set has no place in a checkpoint"):
        checkpoints.save(tmp_path / "run", 1, {"x": {1, 2}})
    assert not (tmp_path / "run").exists()


def test_the_two_newest_are_kept_and_nothing_is_pickled(tmp_path):
    for step in (1, 2, 10, 100):
        checkpoints.save(tmp_path, step, {"step": step, "x": torch.ones(2)})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-00000010", "checkpoint-00000100"]
    files = {p.name for p in tmp_path.glob("*/*")}
    assert files == {"state.json", "tensors.safetensors"}


def cut(path):
    path.write_bytes(path.read_bytes()[:-3])


def flip(path):
    content = bytearray(path.read_bytes())
    content[content.rindex(b"1.0") if b"1.0" in content else -2] ^= 2  # of the JSON a number, which stays a number
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("harm", [cut, flip, lambda p: p.unlink(), lambda p: p.write_text("")])
@pytest.mark.parametrize("file", ["state.json", "tensors.safetensors"])
def test_a_torn_checkpoint_is_passed_over(harm, file, tmp_path):
    for step in (1, 2):
        checkpoints.save(tmp_path, step, {"rate": 1.0, "x": torch.full((2,), float(step))})
    harm(tmp_path / "checkpoint-00000002" / file)
    found = checkpoints.newest(tmp_path)
    assert found[0] == 1 and torch.equal(found[1]["x"], torch.ones(2))
    harm(tmp_path / "checkpoint-00000001" / file)
    assert checkpoints.newest(tmp_path) is None


def test_generators_draw_on_where_they_were(tmp_path):
    cpu = torch.device("cpu")

    def draw():
        return random.random(), np.random.normal(), torch.rand(3)

    random.gauss(0, 1), np.random.normal()  # both keep half of what they drew
    checkpoints.save(tmp_path, 1, checkpoints.random_state(cpu))
    first = draw()
    checkpoints.set_random_state(checkpoints.newest(tmp_path)[1], cpu)
    assert equal(draw(), first)
