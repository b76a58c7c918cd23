import json
import math

import pytest
import torch
from torch import nn

import graft
import models
from graft.core.errors import GraftError
from graft.training import fit, resumption

QUIET = {"progress": False, "warmup": 0.0}


@pytest.fixture
def classify(tokenizer, sentences):
    """A function that trains LoRA on a small BERT to tell early letters of the alphabet from late ones."""

    def run(model=None, count=24, attached=True, **options):
        texts = letters(sentences, count)
        examples = [{"text": t, "label": "early" if t[0] < "n" else "late"} for t in texts]
        model = model or models.bert(2, hidden_dropout_prob=0.1)
        if attached:
            graft.attach(model, graft.LoRA(rank=2), targets=r".*(query|value)", heads=["classifier"])
        return model, fit(model, examples, **{"processor": tokenizer, **QUIET, **options})

    return run


def letters(sentences, count):
    return [" ".join(t[0] * len(t.split())) for t in sentences(count)]


def bits(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# What is learnt


def test_learns_what_can_be_learnt_and_leaves_the_base_alone(classify):
    model = models.bert(2)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    _, result = classify(model, count=160, epochs=20, learning_rate=2e-2, validation=0.25)
    assert result.metrics["accuracy"] >= 0.9 and result.labels == ["early", "late"]
    now = dict(model.named_parameters())
    assert all(torch.equal(now[n], p) for n, p in before.items() if n in now)
    assert model.config.id2label == {0: "early", 1: "late"} and not model.training
    assert not hasattr(model, "_is_accelerate_prepared") and all(p.grad is None for p in model.parameters())


class Recorded(torch.optim.SGD):
    """Keeps the gradients that it was given."""

    def step(self, closure=None):
        Recorded.last = [p.grad.clone() for g in self.param_groups for p in g["params"]]
        return super().step(closure)


@pytest.mark.parametrize("packing", [False, True])
def test_a_step_of_several_batches_has_the_gradient_of_one_batch(packing, tokenizer, sentences):
    """With completions of very different lengths, a mean of means would be another gradient."""
    examples = [{"prompt": a, "completion": " " + b} for a, b in zip(sentences(8), sentences(8, seed=1, longest=30))]
    gradients = []
    for size, accumulation in ((8, 1), (2, 4), (1, 8), (3, 3)):
        model = models.llama()
        models.move(graft.attach(model, graft.LoRA(rank=2)))
        fit(model, examples, processor=tokenizer, batch_size=size, gradient_accumulation=accumulation, steps=1,
            optimizer=Recorded, clip=None, packing=packing, max_length=60, **QUIET)  # fmt: skip
        gradients.append(Recorded.last)
    for other in gradients[1:]:
        for a, b in zip(gradients[0], other):
            assert torch.allclose(a, b, rtol=1e-3, atol=1e-6 * float(a.abs().max()) + 1e-9)


def test_clipping_bounds_the_gradient_and_reports_its_norm(classify):
    _, result = classify(steps=1, clip=1e-3, optimizer=Recorded)
    norm = torch.stack([g.norm() for g in Recorded.last]).norm()
    assert norm.item() == pytest.approx(1e-3, rel=1e-3) and result.history[0]["grad_norm"] > 1e-2


def test_the_rate_follows_the_schedule_for_adapter_and_head(classify):
    rates = []

    class Spy(torch.optim.SGD):
        def step(self, closure=None):
            rates.append(sorted({g["lr"] for g in self.param_groups}))

    classify(steps=10, schedule="linear", warmup=0.2, learning_rate=1.0, head_learning_rate=3.0, optimizer=Spy)
    assert len(rates) == 11  # the first one is the trial of the optimizer
    for k, (adapter, head) in enumerate(rates[1:]):
        p = (k + 0.5) / 10
        assert adapter == pytest.approx(p / 0.2 if p < 0.2 else (1 - p) / 0.8) and head == pytest.approx(3 * adapter)


def test_the_rate_changes_after_so_many_steps(classify):
    given = dict(steps=6, schedule="constant", warmup=0, learning_rate=0.01, optimizer="sgd")
    _, found = classify(**given, rate_changes={4: 3.0, "2": 0.5})
    assert [r["learning_rate"] for r in found.history] == pytest.approx([0.01, 0.01, 0.005, 0.005, 0.03, 0.03])


# What methods take part in


def test_adapters_step_before_the_optimizer_and_their_penalty_counts_once(classify, monkeypatch):
    seen, model = [], models.bert(2)
    adapter = graft.attach(model, graft.LoRA(rank=2), targets=r".*(query|value)")
    frozen = graft.attach(model, graft.LoRA(rank=2), targets=r".*key", name="other").requires_grad_(False)
    inside = next(iter(adapter.deltas.values()))

    def step(self, progress):
        assert self is adapter and all(p.grad is not None for p in adapter.parameters())
        seen.append((progress, [p.detach().clone() for p in adapter.parameters()]))
        return {}

    def penalty(self):
        assert self is not frozen
        return 100 * next(inside.parameters()).sum()

    monkeypatch.setattr(type(adapter), "step", step)
    gradients = []
    for pulled in (False, True):
        if pulled:
            monkeypatch.setattr(type(adapter), "penalty", penalty)
        classify(model, attached=False, steps=4, clip=None, optimizer=Recorded, learning_rate=1e-30,
                 gradient_accumulation=3, batch_size=8)  # fmt: skip
        gradients.append(Recorded.last)
    assert [p for p, _ in seen[:4]] == [0.25, 0.5, 0.75, 1.0]
    difference = [b - a for a, b in zip(*gradients)]
    of = [id(p) for p in adapter.parameters()].index(id(next(inside.parameters())))
    order = [i for i, d in enumerate(difference) if d.abs().max() > 1]
    assert len(order) == 1 and of >= 0 and torch.allclose(difference[order[0]], torch.tensor(100.0), rtol=1e-4)


# Order, seeds, modes


def test_the_same_seed_gives_the_same_bits_and_another_one_others(classify):
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(runs))  # what was drawn before does not matter
        runs.append(bits(classify(epochs=2, seed=seed)[0]))
    assert same(runs[0], runs[1]) and not same(runs[0], runs[2])


def test_evaluation_and_saving_change_no_bit_of_the_training(classify, tmp_path):
    plain = bits(classify(steps=6)[0])
    model, _ = classify(steps=6, validation=[{"text": "a", "label": "early"}], eval_every=1, save_every=1,
                        output=tmp_path)  # fmt: skip
    from graft.training import checkpoints

    _, state = checkpoints.newest(tmp_path)
    resumption.set_tensors(model, state["tensors"])  # the last ones, not the best ones
    assert same(bits(model), plain)


class Normed(nn.Module):
    """A frozen batch normalisation below a head that learns."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.norm, self.head = nn.Embedding(33, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)
        self.drop = nn.Dropout(0.5)
        self.embedding.requires_grad_(False), self.norm.requires_grad_(False)
        self.modes = []

    def forward(self, input_ids, attention_mask=None, token_type_ids=None):
        self.modes.append(self.drop.training)
        return self.head(self.drop(self.norm(self.embedding(input_ids).mean(1))))


def test_a_frozen_batch_normalisation_keeps_its_statistics_while_dropout_works(classify):
    model = Normed()
    before = {k: v.clone() for k, v in model.norm.state_dict().items()}
    classify(model, attached=False, steps=3)
    assert all(torch.equal(v, before[k]) for k, v in model.norm.state_dict().items())
    assert all(model.modes) and model.training


def test_what_the_model_trains_may_be_plain_parameters(classify):
    model = Normed()
    weight = model.head.weight.detach().clone()
    classify(model, attached=False, steps=3)
    assert not torch.equal(model.head.weight, weight)


# Stopping


def test_training_stops_without_progress_and_the_model_carries_the_best(classify, monkeypatch):
    from graft.training import loop

    script = iter([0.5, 0.7, 0.9, 0.8, 0.9, 0.95, 1.0])
    snapshots = []

    def measure(model, *args):
        snapshots.append(bits(model))
        return {"accuracy": next(script), "f1": 0.0, "loss": 1.0}

    monkeypatch.setattr(loop, "measure", measure)
    model, result = classify(steps=20, eval_every=2, patience=2, validation=0.25)
    assert result.steps == 10 and result.best_step == 6 and result.metrics["accuracy"] == 0.9
    assert same(bits(model), snapshots[2]) and not same(bits(model), snapshots[-1])


def test_the_last_parameters_are_kept_where_validation_is_only_looked_at(classify, monkeypatch):
    from graft.training import loop

    script = iter([0.5, 0.9, 0.7])
    monkeypatch.setattr(loop, "measure", lambda *a: {"accuracy": next(script), "f1": 0.0, "loss": 1.0})
    held = [{"text": "a", "label": "early"}]
    model, result = classify(steps=6, eval_every=2, validation=held, keep="last")
    assert result.best_step == 6 and result.metrics["accuracy"] == 0.7
    assert same(bits(model), bits(classify(steps=6)[0]))


def test_lower_is_better_for_a_loss_and_nan_is_never_best(classify, monkeypatch):
    from graft.training import loop

    script = iter([math.nan, 0.5, 0.2, math.nan, 0.3])
    monkeypatch.setattr(loop, "measure", lambda *a: {"accuracy": 0.0, "f1": 0.0, "loss": next(script)})
    _, result = classify(steps=5, eval_every=1, metric="loss", validation=0.25)
    assert result.best_step == 3


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_stops_before_the_parameters_change(where, classify, tmp_path):
    from graft.training import checkpoints

    class Poisoned(Normed):
        def forward(self, input_ids, **rest):
            out, self.calls = super().forward(input_ids, **rest), getattr(self, "calls", 0) + 1
            if self.calls == 5 and where == "loss":
                return out * math.nan
            if self.calls == 5:
                out.register_hook(lambda g: g * math.inf)
            return out

    model = Poisoned()
    with pytest.raises(
        GraftError, match=f"the (loss|norm of the gradient) is (nan|inf) at step 5 .*examples {NUMBERS}"
    ):
        classify(model, attached=False, steps=8, save_every=1, output=tmp_path)
    step, state = checkpoints.newest(tmp_path)
    assert step == 4
    assert torch.equal(state["tensors"]["parameters"]["head.weight"], model.head.weight)
    assert len((tmp_path / "history.jsonl").read_text().splitlines()) == 4


NUMBERS = r"\d+(, \d+)+"


def test_a_loss_that_is_not_finite_names_the_batch(classify, sentences):
    class Picky(Normed):
        def forward(self, input_ids, **rest):
            bad = (input_ids == 33 - 1).any()  # the letter z
            return super().forward(input_ids, **rest) * (math.nan if bad else 1)

    with pytest.raises(GraftError) as caught:
        classify(Picky(), attached=False, batch_size=1, gradient_accumulation=4, count=60, epochs=1)
    named = str(caught.value).split("examples ")[1].split(")")[0].split(", ")
    texts = letters(sentences, 60)
    assert named and all("z" in texts[int(i)] for i in named)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried ..."), MemoryError()])
def test_out_of_memory_says_what_helps(error, classify):
    class Hungry(Normed):
        def forward(self, input_ids, **rest):
            raise error

    with pytest.raises(GraftError, match="out of memory on cpu with batch_size=8: use a smaller batch_size"):
        classify(Hungry(), attached=False, steps=1)


# Memory and precision


def saved_bytes(run):
    """Bytes that autograd keeps for backward, each storage once, without those of parameters."""
    kept = {}

    def pack(t):
        if not isinstance(t, nn.Parameter):
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return sum(kept.values())


def lm(tokenizer, sentences, dtype=torch.float32, **options):
    model = models.llama(dtype, layers=4)
    graft.attach(model, graft.LoRA(rank=2))
    examples = [{"text": t} for t in sentences(8, longest=100)]
    result = fit(model, examples, processor=tokenizer, **{"steps": 1, "learning_rate": 1e-2, **QUIET, **options})
    return model, result


def test_a_bf16_base_keeps_about_half_for_backward_and_trains_fp32_parameters(tokenizer, sentences):
    full = saved_bytes(lambda: lm(tokenizer, sentences))
    half = saved_bytes(lambda: lm(tokenizer, sentences, torch.bfloat16))
    assert half < 0.65 * full
    model, result = lm(tokenizer, sentences, torch.bfloat16, steps=2)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    reference = lm(tokenizer, sentences, steps=2)[1]
    assert result.history[-1]["loss"] == pytest.approx(reference.history[-1]["loss"], rel=0.02)


def test_checkpointing_keeps_less_and_computes_the_same(tokenizer, sentences):
    plain = saved_bytes(lambda: lm(tokenizer, sentences))
    assert saved_bytes(lambda: lm(tokenizer, sentences, checkpointing=True)) < 0.7 * plain
    a, b = (bits(lm(tokenizer, sentences, steps=3, checkpointing=c)[0]) for c in (False, True))
    assert all(torch.allclose(a[k], b[k], atol=1e-6) for k in a)
    assert not lm(tokenizer, sentences, checkpointing=True)[0].is_gradient_checkpointing


def test_bf16_on_a_cpu_trains_with_plain_attention_and_the_model_keeps_its_own(tokenizer, sentences):
    seen = set()

    def run(longest, **options):
        model = models.llama(torch.bfloat16, layers=1)
        graft.attach(model, graft.LoRA(rank=2))
        model.config._attn_implementation = "sdpa"
        model.register_forward_pre_hook(lambda m, a: seen.add(m.config._attn_implementation))
        examples = [{"text": t} for t in sentences(8, longest=longest)]
        fit(model, examples, processor=tokenizer, **{"steps": 1, "learning_rate": 1e-2, **QUIET, **options})
        assert model.config._attn_implementation == "sdpa"
        found = set(seen)
        seen.clear()
        return found

    assert run(50) == {"eager"}
    assert run(50, precision="fp32") == {"sdpa"}
    assert run(100) == {"sdpa"}
    assert run(50, packing=True) == {"sdpa"}


# Records


def test_the_history_is_on_disk_line_by_line(classify, tmp_path):
    _, result = classify(epochs=2, validation=0.25, output=tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert lines == result.history
    steps = [r for r in lines if "loss" in r]
    assert [r["step"] for r in steps] == list(range(1, result.steps + 1)) and steps[-1]["epoch"] == 2
    assert [r["step"] for r in lines if "validation" in r] == [result.steps // 2, result.steps]


def test_trackers_see_every_number(classify, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, result = classify(epochs=2, validation=0.25, output=tmp_path, trackers=["tensorboard"])
    events = EventAccumulator(str(tmp_path / "graft")).Reload()
    losses = [(e.step, pytest.approx(e.value, rel=1e-5)) for e in events.Scalars("loss")]
    assert [(r["step"], r["loss"]) for r in result.history if "loss" in r] == losses
    assert len(events.Scalars("validation/accuracy")) == 2


def test_a_long_run_without_a_terminal_tells_lines(classify, monkeypatch, capsys):
    from graft.training import report

    classify(steps=3, progress=True)
    assert capsys.readouterr().out == ""  # shorter than two seconds
    monkeypatch.setattr(report, "QUIET", 0.0)
    monkeypatch.setattr(report, "EVERY", 0.0)
    classify(steps=3, progress=True)
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == [
        f"step {i} of 3" for i in (1, 2, 3)
    ]


# What is refused


@pytest.mark.parametrize(
    "options,match",
    [
        ({"batch_size": 0}, "batch_size is a whole number of at least 1, not 0"),
        ({"batch_size": 1.5}, "batch_size is a whole number of at least 1, not 1.5"),
        ({"learning_rate": -1e-3}, "learning_rate is a number above 0, not -0.001"),
        ({"learning_rate": "1e-3"}, "learning_rate is a number above 0, not '1e-3'"),
        ({"weight_decay": -1.0}, "weight_decay is a number of at least 0"),
        ({"patience": 2}, "patience needs validation data"),
        ({"rate_changes": {3: 0.0}}, r"rate_changes are {steps taken: a factor above 0}, not 3: 0\.0"),
        ({"rate_changes": {"x": 1.0}}, "rate_changes are {steps taken: a factor above 0}, not 'x'"),
        ({"keep": "all"}, "keep is 'best' or 'last', not 'all'"),
        ({"metric": "acuracy"}, "classification has no metric 'acuracy': did you mean accuracy"),
        ({"schedule": "cosin"}, "did you mean cosine"),
        ({"objective": "regresion"}, "did you mean regression"),
        ({"precision": "fp16"}, "precision is one of auto, fp32, bf16, not 'fp16'"),
        ({"resume": "yes"}, "resume is True, False or 'auto'"),
        ({"trackers": ["tensorboard"]}, "trackers write into the folder of the run"),
        ({"packing": True}, "classification cannot put several examples in a row"),
        ({"validation": 1.5}, "validation=1.5 of 24 examples leaves one of the two parts empty"),
    ],
)
def test_settings_without_a_meaning_are_refused(options, match, classify):
    with pytest.raises(GraftError, match=match):
        classify(**options)


def test_an_unknown_tracker_is_refused(classify, tmp_path):
    with pytest.raises(GraftError, match="'tensorbord': did you mean tensorboard"):
        classify(steps=1, output=tmp_path, trackers=["tensorbord"])
    with pytest.raises(GraftError, match="the tracker dvclive is not installed"):
        classify(steps=1, output=tmp_path, trackers=["dvclive"])


def test_a_model_with_nothing_to_train_is_refused(classify, tokenizer):
    model = models.bert(2).requires_grad_(False)
    with pytest.raises(GraftError, match="nothing to train: attach an adapter first"):
        classify(model, attached=False)
    adapter = graft.attach(model, graft.LoRA(rank=2), targets=r".*query")
    adapter.disable()
    with pytest.raises(GraftError, match="or switch an adapter on"):
        classify(model, attached=False)


# Going on


def test_a_finished_run_is_not_trained_again(classify, tmp_path):
    model, first = classify(epochs=2, validation=0.25, output=tmp_path)
    again, second = classify(epochs=2, validation=0.25, output=tmp_path)
    assert same(bits(model), bits(again)) and second.history == first.history and second.metrics == first.metrics
    assert second.step_seconds is None


def test_a_run_with_other_settings_or_data_is_not_gone_on_with(classify, tmp_path):
    classify(steps=2, output=tmp_path)
    with pytest.raises(GraftError, match=r"learning_rate was 0\.0002 and is 0\.1"):
        classify(steps=2, output=tmp_path, learning_rate=0.1)
    with pytest.raises(GraftError, match="the data changed"):
        classify(steps=2, output=tmp_path, count=23)
    _, anew = classify(steps=2, output=tmp_path, learning_rate=0.1, resume=False)
    assert anew.history[0]["learning_rate"] > 0.01
    with pytest.raises(GraftError, match="holds no checkpoint to go on from"):
        classify(steps=2, output=tmp_path / "empty", resume=True)


def test_a_run_goes_on_with_another_rate_as_if_it_had_been_planned_so(classify, tmp_path):
    def stop(entry):
        if entry["step"] == 4:
            raise KeyboardInterrupt

    given = dict(steps=6, save_every=3, learning_rate=0.01, output=tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        classify(**given, rate_changes={1: 2.0}, watch=stop)
    with pytest.raises(GraftError, match=r"rate_changes was \[\[1, 2\.0\]\] and is \[\[2, 2\.0\]\]"):
        classify(**given, rate_changes={2: 2.0})
    model, gone_on = classify(**given, rate_changes={1: 2.0, 3: 0.25})
    planned, whole = classify(**{**given, "output": None}, rate_changes={1: 2.0, 3: 0.25})
    assert same(bits(model), bits(planned))
    assert [(r["loss"], r["learning_rate"]) for r in gone_on.history] == [
        (r["loss"], r["learning_rate"]) for r in whole.history
    ]
