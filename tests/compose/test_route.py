"""Each row of a batch is served by its own adapter: row i of the batch is what adapter i alone computes."""

import functools
import gc
import weakref

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

import graft
from graft import methods
from graft.core.delta import METHODS
from models import attach, bert, gpt2, llama, move, tokens

methods.load()
WITHOUT_CACHE = ("lisa", "surgical")  # whole blocks of a row's own: keys and values of other rows do not pass them
NAMES = sorted(n for n, cls in METHODS.items() if cls.__module__.startswith("graft."))


def alone(model, names, x, row, **more):
    names = [names] if isinstance(names, str) else names or []
    graft.activate(model, *names)
    return model(input_ids=x[row : row + 1], **{k: v[row : row + 1] for k, v in more.items()}).logits[0]


def agree(model, rows, x, **more):
    """Rows are computed in other ways where gradients are wanted."""
    with graft.route(model, rows):
        together = model(input_ids=x, **more).logits
        with torch.no_grad():
            frozen = model(input_ids=x, **more).logits
    for i, names in enumerate(rows):
        single = alone(model, names, x, i, **more)
        torch.testing.assert_close(together[i], single)
        torch.testing.assert_close(frozen[i], single)


@pytest.mark.parametrize("method", NAMES)
def test_rows_of_one_method(method):
    model = llama(torch.float64, attention_bias=True)
    model.config.use_cache = method not in WITHOUT_CACHE
    for i in range(3):
        attach(model, method, f"a{i}", seed=i)
    agree(model, ["a2", None, "a0", "a1", "a0"], tokens(5))


@pytest.mark.parametrize("make", [gpt2, bert])
@pytest.mark.parametrize("method", [n for n in NAMES if n not in ("full", "tokens", "llama_adapter", "ln_tuning")])
def test_rows_of_one_method_on_other_models(method, make):
    model = make().double()
    if METHODS[method].hosts == ("model",) and make is bert:
        pytest.skip("the pooler of this model is given the first state")
    if method == "prefix_tuning" and make is bert and transformers.__version__ < "5":
        pytest.skip("its attention product cannot be reached before transformers 5")
    model.config.use_cache = method not in WITHOUT_CACHE
    for i in range(2):
        attach(model, method, f"a{i}", seed=i)
    agree(model, ["a1", None, "a0"], tokens(3))


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_rows_of_any_methods(data):
    model = llama(torch.float64, attention_bias=True)
    last = functools.partial(sorted, key=lambda name: name.startswith("tangent"))  # what needs a weight runs inside
    chosen = last(data.draw(st.lists(st.sampled_from(NAMES), min_size=2, max_size=5)))
    model.config.use_cache = not {*chosen} & {*WITHOUT_CACHE}
    for i, method in enumerate(chosen):
        attach(model, method, f"{method}-{i}", seed=i)
    names = list(graft.adapters(model))
    row = st.one_of(
        st.none(), st.sampled_from(names), st.lists(st.sampled_from(names), max_size=2, unique=True).map(last)
    )
    rows = data.draw(st.lists(row, min_size=1, max_size=6))
    agree(model, rows, tokens(len(rows)))


MIXED = ["lora", "dora", "ia3", "oft", "houlsby", "prompt_tuning", "prefix_tuning", "llama_adapter", "shira"]


def mixed_model(make=llama, methods=MIXED, **config):
    model = make(torch.float64, **config) if make is llama else make(**config).double()
    for i, method in enumerate(methods):
        attach(model, method, method, seed=i)
    return model


@pytest.mark.parametrize(
    "how",
    [
        dict(do_sample=False),
        dict(do_sample=True, top_k=5),
        dict(num_beams=3),
        dict(num_beams=2, num_return_sequences=2),
        dict(do_sample=False, use_cache=False),
    ],
    ids=str,
)
def test_generation_follows_the_rows(how):
    model, x = mixed_model(), tokens(4, 6)
    rows, mask = ["lora", "prompt_tuning", None, "prefix_tuning"], torch.ones_like(x)
    more = dict(max_new_tokens=5, min_new_tokens=5, pad_token_id=0, output_scores=True, return_dict_in_generate=True)
    torch.manual_seed(0)
    together = model.generate(x, attention_mask=mask, adapters=rows, **how, **more)
    torch.manual_seed(0)
    with graft.route(model, rows):
        again = model.generate(x, attention_mask=mask, **how, **more)
    assert torch.equal(together.sequences, again.sequences)
    if how.get("do_sample"):  # which draws come for a row depends on the batch; the probabilities must not
        steps = torch.stack(together.scores, 1)
        for i, names in enumerate(rows):
            logits = alone(model, names, together.sequences, i)[5:-1]
            kept = steps[i].isfinite()
            torch.testing.assert_close(steps[i][kept], logits[kept].float())
        return
    several = how.get("num_return_sequences", 1)
    for i, names in enumerate(rows):
        graft.activate(model, *([names] if names else []))
        single = model.generate(x[i : i + 1], attention_mask=mask[i : i + 1], **how, **more)
        assert torch.equal(together.sequences[i * several : (i + 1) * several], single.sequences)


def test_a_matrix_is_read_once_for_all_rows():
    model, x = mixed_model(methods=["lora", "dora", "oft", "hra", "ia3"]), tokens(7)
    rows, read = ["lora", "oft", "dora", None, "hra", "oft", "ia3"], []

    class Reads(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is F.linear:
                read.append(id(args[1]))
            return func(*args, **kwargs or {})

    with torch.no_grad(), graft.route(model, rows):
        model(input_ids=x)  # prepares
        with Reads():
            model(input_ids=x)
    hosts = [id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert {read.count(host) for host in hosts} == {1}


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision(autocast):
    model, x = llama(torch.float32 if autocast else torch.bfloat16), tokens(10)
    for i in range(2):
        for method in ("lora", "dora", "oft", "houlsby", "ia3"):
            attach(model, method, f"{method}{i}", seed=i)
    rows = list(graft.adapters(model))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with graft.route(model, rows):
            together = model(input_ids=x).logits
        single = torch.stack([alone(model, name, x, i) for i, name in enumerate(rows)])
    assert together.dtype == single.dtype
    norm = lambda t: t.float().flatten(1).norm(dim=1)
    assert (norm(together - single) < 2**-7 * norm(single)).all()  # what one rounding to bfloat16 loses


def test_left_padding_and_prompts_of_different_lengths():
    model = llama(torch.float64)
    for i, length in enumerate((1, 4, 2)):
        attach(model, "prompt_tuning", f"prompt{i}", seed=i, length=length)
        attach(model, "prefix_tuning", f"prefix{i}", seed=i, length=length)
    x, mask = tokens(6, 7), torch.ones(6, 7, dtype=torch.long)
    mask[0, :3] = mask[4, :2] = 0
    rows = ["prompt0", "prompt1", None, "prefix2", "prefix1", "prompt2"]
    with graft.route(model, rows):
        written = model.generate(x, attention_mask=mask, max_new_tokens=6, min_new_tokens=6, pad_token_id=0)
        together = model(input_ids=x, attention_mask=mask).logits
    for i, names in enumerate(rows):
        real = mask[i].bool()
        torch.testing.assert_close(together[i][real], alone(model, names, x, i, attention_mask=mask)[real])
        single = model.generate(
            x[i : i + 1], attention_mask=mask[i : i + 1], max_new_tokens=6, min_new_tokens=6, pad_token_id=0
        )
        assert torch.equal(written[i], single[0])


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_prefixes_of_different_lengths_in_both_products(implementation):
    model = llama(torch.float64, attn_implementation=implementation)
    for i, length in enumerate((1, 5)):
        for method in ("prefix_tuning", "llama_adapter"):
            attach(model, method, f"{method}{i}", seed=i, length=length)
    agree(model, ["prefix_tuning1", "llama_adapter0", None, "llama_adapter1", "prefix_tuning0"], tokens(5))


def test_gradients_of_a_row_reach_its_own_adapter_only():
    model, x = mixed_model(), tokens(5)
    rows = ["lora", "dora", ("oft", "lora"), "prefix_tuning", None]
    with graft.route(model, rows):
        losses = model(input_ids=x).logits.sin().sum((1, 2))
        losses[1].backward(retain_graph=True)
        touched = {
            n
            for n, a in graft.adapters(model).items()
            if any(p.grad is not None and p.grad.any() for p in a.parameters())
        }
        assert touched == {"dora"}
        model.zero_grad()
        losses.sum().backward()
    got = {n: [p.grad for p in a.parameters()] for n, a in graft.adapters(model).items()}
    model.zero_grad(set_to_none=True)
    for i, names in enumerate(rows):
        alone(model, names, x, i).sin().sum().backward() if names else None
    for name, adapter in graft.adapters(model).items():
        for mine, p in zip(got[name], adapter.parameters()):
            if p.grad is None:
                assert mine is None or not mine.any()
            else:
                torch.testing.assert_close(mine, p.grad)


@pytest.mark.parametrize("inside", [True, False])
def test_checkpointed_activations(inside):
    model, x = mixed_model(methods=["lora", "dora", "houlsby"]), tokens(3)
    rows = ["lora", "dora", "houlsby"]

    def gradients(checkpointed):
        model.zero_grad(set_to_none=True)
        if checkpointed:
            model.train()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with graft.route(model, rows):
            loss = model(input_ids=x, use_cache=False).logits.sin().sum()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        return [p.grad for a in graft.adapters(model).values() for p in a.parameters()]

    plain = gradients(False)
    if not inside:
        with pytest.raises(graft.GraftError, match="call backward inside"):
            gradients(True)
        graft.activate(model, "lora")  # and a pass without a route is as ever
        model(input_ids=x, use_cache=False).logits.sum().backward()
        return
    for a, b in zip(plain, gradients(True)):
        torch.testing.assert_close(a, b)


def test_threads_have_routes_of_their_own():
    import threading

    model, x = mixed_model(), tokens(2)
    expect = {n: alone(model, n, x, 0).detach() for n in MIXED}
    wrong = []

    def serve(name):
        for _ in range(5):
            with torch.no_grad(), graft.route(model, [name, None]):
                if not torch.allclose(model(input_ids=x).logits[0], expect[name]):
                    wrong.append(name)

    threads = [threading.Thread(target=serve, args=(n,)) for n in MIXED[:6]]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_a_change_of_parameters_is_seen_within_a_route():
    model, x = mixed_model(), tokens(3)
    rows = ["lora", "dora", "oft"]
    with torch.no_grad(), graft.route(model, rows):
        before = model(input_ids=x).logits
        for name in rows:
            move(graft.adapters(model)[name])
        after = model(input_ids=x).logits
    assert not torch.equal(before, after)
    for i, name in enumerate(rows):
        torch.testing.assert_close(after[i], alone(model, name, x, i))


def test_heads_of_a_classifier():
    model = bert().double()
    for name in ("a", "b"):
        move(graft.attach(model, "lora", name=name, heads=["classifier"]), seed=ord(name))
    agree(model, ["b", None, "a"], tokens(3))


@pytest.mark.parametrize("bank", [False, True])
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_heads_of_different_sizes(family, bank, tmp_path):
    def fresh(labels):
        if family == "bert":
            return bert(labels).double()
        torch.manual_seed(0)
        config = transformers.RobertaConfig(
            hidden_size=32, num_hidden_layers=2, intermediate_size=48, num_attention_heads=4, vocab_size=50,
            num_labels=labels, max_position_embeddings=64,
        )  # fmt: skip
        return transformers.RobertaForSequenceClassification(config).double().eval()

    x, expect = tokens(4, vocabulary=48) + 2, {}
    base = fresh(3)
    inside = {k: v for k, v in base.state_dict().items() if not k.startswith("classifier.")}
    for name, labels in (("two", 2), ("three", 3), ("five", 5)):
        model = fresh(labels)
        model.load_state_dict(inside, strict=False)
        move(graft.attach(model, "lora", name=name, heads=["classifier"]), seed=labels).save(tmp_path / name)
        expect[name] = model(input_ids=x).logits.detach()
    expect[None] = base(input_ids=x).logits.detach()
    if bank:
        adapters = graft.Bank(base)
    for name in ("two", "three", "five"):
        adapters.add(name, tmp_path / name) if bank else graft.load(base, tmp_path / name)
    rows = ["five", None, "two", "three"]
    with torch.no_grad(), graft.route(base, rows):
        together = base(input_ids=x).logits
    assert together.shape == (4, 5)
    for i, name in enumerate(rows):
        own = expect[name].shape[1]
        torch.testing.assert_close(together[i, :own], expect[name][i])
        assert (together[i, own:] == -torch.inf).all()


def test_refusals():
    model = mixed_model(methods=["lora", "dora"])
    x = tokens(4)
    with pytest.raises(graft.GraftError, match=r"no adapter is called 'loar'.*lora, dora"):
        graft.route(model, ["lora", "loar"]).__enter__()
    with (
        pytest.raises(graft.GraftError, match="gets 4 rows, and the route has 3"),
        graft.route(model, ["lora", "dora", None]),
    ):
        model(input_ids=x)
    with pytest.raises(graft.GraftError, match="gets 4 rows, and the route has 3"):
        model(input_ids=x, adapters=["lora", "dora", None])
    with pytest.raises(graft.GraftError, match="rows must be a list"):
        model(input_ids=x, adapters="lora")
    with pytest.raises(graft.GraftError, match="carries no adapter"):
        graft.route(llama(), ["lora"]).__enter__()
    torch.testing.assert_close(model(input_ids=x, adapters=None).logits, model(input_ids=x).logits)
    with graft.merge(model), pytest.raises(graft.GraftError, match="merged"):
        graft.route(model, ["lora"]).__enter__()


def test_one_name_for_all_rows_of_one():
    """A batch of any size under a route of one row."""
    model, x = mixed_model(), tokens(4)
    for name in MIXED:
        with graft.route(model, [name]):
            together = model(input_ids=x).logits
        graft.activate(model, name)
        torch.testing.assert_close(together, model(input_ids=x).logits)


def test_compiled_models_follow_routes_and_are_not_compiled_again():
    model, x = mixed_model(methods=["lora", "dora", "houlsby", "prefix_tuning"]), tokens(3)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter)
    rows = [["lora", "dora", None], ["houlsby", "prefix_tuning", "lora"], ["lora", "lora", "dora"]]
    counts = []
    with torch.no_grad():
        plain = compiled(input_ids=x, use_cache=False).logits
        for names in rows:
            with graft.route(model, names):
                together = compiled(input_ids=x, use_cache=False).logits
                torch.testing.assert_close(together, model(input_ids=x, use_cache=False).logits)
            counts.append(counter.frame_count)
        assert len({*counts}) == 1, f"compiled again: {counts}"
        torch.testing.assert_close(compiled(input_ids=x, use_cache=False).logits, plain)


def test_the_model_stays_as_it_is_while_a_route_serves():
    model, x = mixed_model(methods=["lora", "dora", "oft"]), tokens(2)
    with graft.route(model, ["lora", "dora"]):
        before = model(input_ids=x).logits
        for what in (graft.adapters(model)["lora"].detach, lambda: graft.merge(model)):
            with pytest.raises(graft.GraftError, match="a route serves adapter 'lora': close the route first"):
                what()
        graft.adapters(model)["oft"].detach()
        graft.activate(model, "dora")
        assert torch.equal(model(input_ids=x).logits, before)
        with graft.disabled(model):
            torch.testing.assert_close(model(input_ids=x).logits, llama(torch.float64)(x).logits)
        assert torch.equal(model(input_ids=x).logits, before)
    graft.adapters(model)["lora"].detach()


def test_dropout_in_training_differs_by_row():
    model, x = llama(torch.float64, attention_bias=True), tokens(1).expand(4, -1)
    attach(model, "lora", "dropped", dropout=0.5)
    attach(model, "lora", "plain", seed=2)
    rows = ["dropped", "dropped", "plain", "plain"]
    with graft.route(model.train(), rows):
        y = model(input_ids=x).logits
    assert not torch.allclose(y[0], y[1]) and torch.allclose(y[2], y[3])
    agree(model.eval(), rows, x)


def test_a_route_that_is_closed_does_not_keep_its_model():
    model, x = mixed_model(methods=["lora", "dora"]), tokens(2)
    model(input_ids=x, adapters=["lora", "dora"]).logits.sum().backward()
    alive = [weakref.ref(m) for m in (model, model.model.layers[0].self_attn.q_proj)]
    del model
    gc.collect()
    assert [ref() for ref in alive] == [None, None]
