"""What is predicted, beside what torch's allocator gives while the same steps are taken in earnest."""

import itertools

import pytest
import torch
from torch._C._profiler import _EventType

import graft
from graft.core.errors import GraftError
from graft.core.recipe import Recipe
from graft.models import Base
from graft.prediction import DRY, Rehearsal, predict_cost
from graft.prediction.dry import Dry
from graft.training.evaluation import choose
from models import llama, picture, tokenizer

WORDS = tokenizer()
TEXTS = [{"prompt": "the film was ", "completion": "very good " * (2 + i % 5)} for i in range(12)]
SETTINGS = dict(steps=50, batch_size=4)
METHODS = ("lora", "hira", "houlsby", "prefix_tuning", "shira", "adalora", "vera", "gps")
WAYS = list(itertools.product((torch.float32, torch.bfloat16), (False, True)))


def base(dtype=torch.float32):
    sizes = dict(hidden_size=64, intermediate_size=96, vocab_size=len(WORDS), layers=1)
    return Base("tiny", llama(dtype, **sizes), WORDS)


def measured(base, data, method, **settings):
    """The most bytes that tensors took at a time."""
    adaptation = dict(method=method, targets=None, heads=None, seed=0, examples_for_statistics=64)
    run = Rehearsal(base, choose("auto", data, base.model), data, settings, **adaptation)
    run.adapt(base)
    own = {t.data_ptr(): t.nbytes for t in (*base.model.parameters(), *base.model.buffers())}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as found:
        run.fit(base.model, DRY)
    waiting, totals = list(found.profiler.kineto_results.experimental_event_tree()), [0]
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.tag == _EventType.Allocation:
            totals.append(event.extra_fields.total_allocated)
    return sum(own.values()) + max(totals)


# Each method in two of the four ways, a different half for neighbours.
@pytest.mark.parametrize(
    "name, dtype, checkpointing", [(m, *w) for i, m in enumerate(METHODS) for w in (WAYS[i % 2], WAYS[3 - i % 2])]
)
def test_predicted_peak_is_within_a_tenth_of_what_the_allocator_gives(name, dtype, checkpointing):
    method, settings = Recipe.of(name), dict(SETTINGS, checkpointing=checkpointing)
    cost = predict_cost(base(dtype), TEXTS, method=method, measure=False, **settings)
    assert cost.peak == pytest.approx(measured(base(dtype), TEXTS, method, **settings), rel=0.1)
    assert sum(cost.parts.values()) == cost.peak


def test_parts_are_what_they_are_by_count():
    made = base()
    weights = sum(p.nbytes for p in made.model.parameters()) + sum(b.nbytes for b in made.model.buffers())
    cost = predict_cost(made, TEXTS, method=graft.LoRA(rank=4), targets="q_proj", measure=False, **SETTINGS)
    assert cost.parts["weights"] == weights and cost.parameters == 4 * (64 + 64)
    assert cost.parts["adapter"] == cost.file == 4 * cost.parameters
    # AdamW: two averages, and a count for each of A and B.
    assert cost.parts["optimizer"] == 8 * cost.parameters + 2 * 4
    assert cost.batch[0] == 4 and cost.steps == 50
    # A token passes 2 flops a weight forward and 2 for the gradient of its input, of all products but the first ones;
    # those of attention and LoRA are few.
    hosts = sum(p.numel() for n, p in made.model.named_parameters() if p.ndim == 2 and "embed" not in n)
    assert 2 < cost.flops / (cost.batch[0] * cost.batch[1] * hosts) < 4.5


def test_all_parameters_of_the_base_can_be_what_is_trained():
    made = base()
    cost = predict_cost(made, TEXTS, method=None, measure=False, **SETTINGS)
    count = sum(p.numel() for p in made.model.parameters())
    assert cost.parameters == count and cost.file == 0
    assert cost.parts["optimizer"] >= 8 * count
    assert cost.peak == pytest.approx(measured(base(), TEXTS, None, **SETTINGS), rel=0.1)


def test_a_step_is_timed_on_a_model_that_stays_as_it_was():
    made = base()
    before = picture(made.model)
    cost = predict_cost(made, TEXTS, method="lora", **SETTINGS)
    assert picture(made.model) == before
    assert cost.measured and cost.step_seconds > 0 and cost.seconds == 50 * cost.step_seconds


def test_what_comes_from_data_keeps_its_contents_and_what_comes_from_weights_has_none():
    dry = Dry()
    twin = dry.twin(torch.nn.Linear(6, 5, bias=False).to("meta"), torch.device("cpu"))
    with dry:
        x = torch.arange(12.0).view(2, 6)
        y = twin(x[x[:, 0] > 3])
        assert y.shape == (1, 5) and y.device.type == "cpu" and float(y.detach().sum()) == 1.0
        huge = torch.empty(2**40, 2**10)  # more than any machine has
        del huge
    peak, parts = dry.peak()
    assert peak > 2**52 and parts["weights"] == 4 * 30


@pytest.mark.parametrize(
    "settings, said",
    [
        (dict(method="bitfit"), "it has no bias"),
        (dict(quantise="int8"), "on a base quantised by int8 cannot be predicted: leave quantise out"),
        (dict(precision="fp64"), "precision is one of auto, fp32, bf16, not 'fp64'"),
        (dict(batch_size=0), "batch_size is a whole number of at least 1, not 0"),
        (dict(method="lorra"), "no method is called 'lorra'"),
    ],
)
def test_bad_input_is_one_sentence(settings, said):
    with pytest.raises(GraftError, match=said):
        predict_cost(base(), TEXTS, measure=False, **(SETTINGS | settings))
