"""Each initialisation against its closed form, and against PEFT."""

import dataclasses
import importlib.util
import sys
from types import SimpleNamespace

import peft
import pytest
import torch
from peft import EvaConfig, LoraConfig
from peft.tuners.lora.config import CordaConfig, LoraGAConfig
from peft.tuners.lora.eva import initialize_lora_eva_weights
from peft.tuners.lora.loraga import preprocess_loraga
from peft.utils.loftq_utils import _low_rank_decomposition
from torch import nn

import graft
from graft.core.sites.quantised import QuantisedSite
from graft.core.statistics import Components
from graft.inits.corda import damped
from models import bert, gpt2, llama, move, tokens

PATH = "model.layers.0.mlp.down_proj"
ALPHA, R = 6.0, 4
S = ALPHA / R


def mean_loss(model, batch):
    return model(batch).logits.logsumexp(-1).mean()


def attach(model, init, batches=(), targets="down_proj", **hyper):
    recipe = graft.LoRA(**dict(rank=R, alpha=ALPHA, init=init) | hyper)
    needs = recipe.method.asks(recipe.hyper)
    stats = graft.collect(model, batches, needs, targets, loss=mean_loss) if needs else None
    return graft.attach(model, recipe, targets, stats=stats)


def theirs(model, init, targets=("down_proj",), **more):
    config = LoraConfig(r=R, lora_alpha=ALPHA, target_modules=list(targets), init_lora_weights=init, **more)
    return config, lambda: peft.get_peft_model(model, config)


def compare(adapter, other):
    """The same factors, up to the sign of each pair, and the same frozen rest."""
    for path, delta in adapter.deltas.items():
        layer = other.get_submodule(f"base_model.model.{path}")
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        signs = (delta.A * A).sum(1).sign()
        torch.testing.assert_close(delta.A, signs[:, None] * A, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(delta.B, signs * B, rtol=1e-3, atol=1e-4)
        rest = layer.base_layer.weight
        rest = rest.T if layer.fan_in_fan_out else rest
        torch.testing.assert_close(delta.rest(delta.site.weight), rest, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("make, targets", [(llama, ["q_proj", "down_proj"]), (gpt2, ["c_attn", "c_proj"])])
def test_a_start_out_of_the_weights_is_that_of_peft(init, make, targets):
    if init == "olora" and make is gpt2:
        pytest.skip("PEFT's OLoRA takes the transposed matrix of a Conv1D for the matrix")
    adapter = attach(make(), init, targets=targets)
    compare(adapter, theirs(make(), init, targets, fan_in_fan_out=make is gpt2)[1]())


def test_the_fast_svd_of_pissa_is_near_the_exact_one():
    torch.manual_seed(0)
    w = torch.linalg.qr(torch.randn(96, 96)).Q * 0.7 ** torch.arange(96.0) @ torch.linalg.qr(torch.randn(96, 96)).Q
    model = nn.Sequential(nn.Linear(96, 96))
    with torch.no_grad():
        model[0].weight.copy_(w)
    exact, fast = (
        graft.attach(model, graft.LoRA(rank=R, init=init), "0", name=name).deltas["0"]
        for name, init in (("exact", "pissa"), ("fast", "pissa,niter=4"))
    )
    torch.testing.assert_close(fast.rest(w), exact.rest(w), rtol=0, atol=1e-4)


def test_an_orthogonal_start_has_no_product_and_teaches_both_factors():
    model = llama()
    y = model(tokens()).logits
    adapter = attach(model, "orthogonal")
    delta = adapter.deltas[PATH]
    assert delta.A.norm() > 0.5 and delta.B.norm() > 0.5
    torch.testing.assert_close(delta.B @ delta.A, torch.zeros(32, 48), rtol=0, atol=1e-6)
    torch.testing.assert_close(model(tokens()).logits, y)
    mean_loss(model, tokens()).backward()
    assert delta.A.grad.norm() > 0 and delta.B.grad.norm() > 0
    layer = theirs(llama(), "orthogonal")[1]().get_submodule(f"base_model.model.{PATH}")
    for mine, other in ((delta.A, layer.lora_A), (delta.B, layer.lora_B)):
        torch.testing.assert_close(mine.std(), other["default"].weight.std(), rtol=0.4, atol=0)


@pytest.mark.parametrize(("mode", "method"), [("instruction", "ipm"), ("knowledge", "kpm")])
@pytest.mark.parametrize("make, targets", [(llama, ["q_proj", "o_proj"]), (gpt2, ["c_attn"])])
def test_corda_is_that_of_peft(mode, method, make, targets, monkeypatch):
    if importlib.util.find_spec("attr") is None:  # which PEFT takes for granted here, for one class
        monkeypatch.setitem(sys.modules, "attr", SimpleNamespace(dataclass=dataclasses.dataclass))
    from peft.tuners.lora.corda import preprocess_corda

    batches = [tokens(1, 60, seed=i) for i in range(3)]  # PEFT takes one sequence at a time
    adapter = attach(make(), f"corda,mode={mode}", batches, targets)
    other = make()
    options = dict(corda_config=CordaConfig(corda_method=method), fan_in_fan_out=make is gpt2)
    config, wrap = theirs(other, "corda", targets, **options)
    preprocess_corda(other, config, run_model=lambda: [other(b) for b in batches])
    compare(adapter, wrap())


@pytest.mark.parametrize("rank", [1, 4, 9])
def test_corda_loses_least_of_what_the_module_computes(rank):
    model = llama().double()
    stats = graft.collect(model, [tokens(4, 20)], ["input_covariance"], "q_proj", loss=mean_loss)
    path = "model.layers.1.self_attn.q_proj"
    w, C = model.get_submodule(path).weight.detach(), damped(stats[path]["input_covariance"])[0]
    lost = {}
    for init in ("corda", "pissa"):
        adapter = graft.attach(model, graft.LoRA(rank=rank, init=init), "q_proj", name=init, stats=stats)
        A, B = adapter.deltas[path].product()
        lost[init] = torch.linalg.norm((w - B @ A) @ C)
    best = torch.linalg.svdvals(w @ C)[rank:].square().sum().sqrt()  # Eckart, Young
    torch.testing.assert_close(lost["corda"], best, rtol=1e-4, atol=0)
    assert lost["corda"] < 0.98 * lost["pissa"]


def test_eva_has_the_directions_of_the_inputs_and_the_ranks_of_the_largest_shares():
    model, batches = llama().double(), [tokens(4, 20), tokens(4, 20, seed=1)]
    stats = graft.collect(model, batches, ["input_components:48"], "mlp", loss=mean_loss)
    stats = {path: {"input_components:8": found["input_components:48"]} for path, found in stats.items()}
    y = model(tokens()).logits
    adapter = graft.attach(model, graft.LoRA(rank=R, alpha=ALPHA, init="eva"), "mlp", stats=stats)
    assert torch.equal(model(tokens()).logits, y)
    shares = {path: found["input_components:8"].shares[:8] for path, found in stats.items()}
    ranks = {path: len(d.A) for path, d in adapter.deltas.items()}
    assert sum(ranks.values()) == R * len(stats) and len(set(ranks.values())) > 1
    # The greedy choice of the largest is the best one of that many.
    found = sum(shares[path][:rank].sum() for path, rank in ranks.items())
    limited = torch.cat([s[: 2 * R] for s in shares.values()])
    torch.testing.assert_close(found, limited.sort(descending=True).values[: R * len(stats)].sum())
    assert found > sum(s[:R].sum() for s in shares.values())
    for delta in adapter.deltas.values():
        assert delta.scaling == pytest.approx(S)
        torch.testing.assert_close(delta.A @ delta.A.T, torch.eye(len(delta.A), dtype=torch.float64), atol=1e-6, rtol=0)
        seen = []
        handle = delta.site.module.register_forward_hook(lambda m, args, out, seen=seen: seen.append(args[0]))
        for batch in batches:
            model(batch)
        handle.remove()
        rows = torch.cat([x.flatten(0, -2) for x in seen])
        V = torch.linalg.svd(rows - rows.mean(0), full_matrices=False).Vh[: len(delta.A)]
        torch.testing.assert_close((V @ delta.A.T).abs(), torch.eye(len(V), dtype=torch.float64), atol=1e-5, rtol=0)


@pytest.mark.parametrize("whiten", [False, True])
def test_eva_is_that_of_peft(whiten):
    batch = tokens(8, 40)
    adapter = attach(llama(), f"eva,whiten={str(whiten).lower()}", [batch], "down_proj|o_proj")
    _, wrap = theirs(llama(), "eva", ["down_proj", "o_proj"], eva_config=EvaConfig(whiten=whiten))
    other = wrap()
    initialize_lora_eva_weights(
        other, [{"input_ids": batch, "attention_mask": torch.ones_like(batch)}], show_progress_bar=False
    )
    ranks = {path: len(delta.A) for path, delta in adapter.deltas.items()}
    assert len(set(ranks.values())) > 1
    for path, delta in adapter.deltas.items():
        layer = other.get_submodule(f"base_model.model.{path}")
        A = layer.lora_A["default"].weight
        assert len(A) == len(delta.A)
        assert layer.scaling["default"] == pytest.approx(delta.scaling)
        # Neighbours with nearly equal shares may be turned into each other by its iterations: compare the spaces.
        if not whiten:
            torch.testing.assert_close(delta.A.T @ delta.A, A.T @ A, rtol=0, atol=0.05)
        twice = 2**0.25 if whiten else 1  # PEFT runs over the data again until nothing moves, and counts it each time
        torch.testing.assert_close(delta.A.norm(dim=1), twice * A.norm(dim=1), rtol=0.02, atol=0)


def test_eva_leaves_modules_without_variance_out_and_says_so_in_the_file(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)).double()
    shares = {"0": [0.6, 0.3, 0.05, 0.05], "1": [0.04, 0.03, 0.02, 0.01]}
    stats = {
        p: {"input_components:4": Components(torch.eye(6)[:4], torch.ones(4), torch.tensor(s))}
        for p, s in shares.items()
    }
    adapter = graft.attach(model, graft.LoRA(rank=2, alpha=4.0, rslora=True, init="eva"), r"\d", stats=stats)
    assert list(adapter.deltas) == ["0"] and len(adapter.deltas["0"].A) == 4
    assert adapter.deltas["0"].scaling == pytest.approx(4 / 2**0.5)
    move(adapter)
    x = torch.randn(3, 6, dtype=torch.float64)
    y = model(x)
    adapter.save(tmp_path / "adapter")
    adapter.detach()
    graft.load(model, tmp_path / "adapter")
    assert torch.equal(model(x), y)


def small():
    """A module, an input, and the gradient G of the loss in its matrix."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 24)).double()
    batch = torch.randn(50, 20, dtype=torch.float64), torch.randn(50, 24, dtype=torch.float64)
    loss = lambda model, batch: (model(batch[0]) - batch[1]).square().mean()
    stats = graft.collect(model, [batch], ["weight_grad"], "0", loss=loss)
    return model, batch, loss, stats, stats["0"]["weight_grad"]


def first_step(delta, loss, rate=1e-6):
    """The change of W by one small step of gradient descent, over the rate."""
    before = delta.weight(delta.site.weight).detach()
    own = [p for p in delta.parameters() if p.requires_grad]
    with torch.no_grad():
        for p, g in zip(own, torch.autograd.grad(loss, own)):
            p.sub_(rate * g)
    return (delta.weight(delta.site.weight).detach() - before) / rate


def cosine(a, b):
    return ((a * b).sum() / a.norm() / b.norm()).item()


@pytest.mark.parametrize("rank", [1, 3, 10])
def test_the_first_step_of_lora_ga_is_the_best_approximation_of_full_tuning(rank):
    model, batch, loss, stats, G = small()
    values = torch.linalg.svdvals(G)
    best = (values[: 2 * rank].norm() / values.norm()).item()  # of any matrix of rank 2r
    found = {}
    for init in ("lora_ga", "random", "pissa", "orthogonal" if rank % 2 == 0 else "olora"):
        adapter = graft.attach(model, graft.LoRA(rank=rank, rslora=True, init=init), "0", stats=stats)
        found[init] = cosine(first_step(adapter.deltas["0"], loss(model, batch)), -G)
        adapter.detach()
    assert found["lora_ga"] == pytest.approx(best, abs=1e-5)
    assert all(value < best - 0.02 for init, value in found.items() if init != "lora_ga"), found


def test_the_first_step_of_lora_ga_has_the_size_of_its_formula():
    model, batch, loss, stats, G = small()
    delta = graft.attach(model, graft.LoRA(rank=3, rslora=True, init="lora_ga,gamma=9"), "0", stats=stats).deltas["0"]
    U, V = (torch.linalg.svd(G).U, torch.linalg.svd(G).Vh)
    c = 24**0.25 / 3
    torch.testing.assert_close(delta.A.T @ delta.A, c**2 * V[:3].T @ V[:3], atol=1e-6, rtol=0)
    torch.testing.assert_close(delta.B @ delta.B.T, c**2 * U[:, 3:6] @ U[:, 3:6].T, atol=1e-6, rtol=0)
    low = U[:, :6] @ U[:, :6].T @ G
    torch.testing.assert_close(
        first_step(delta, loss(model, batch)), -(delta.scaling**2) * c**2 * low, rtol=1e-3, atol=1e-6
    )


def test_lora_ga_has_the_directions_of_peft_and_the_scale_of_its_authors():
    batches = [tokens(), tokens(seed=1)]
    adapter = attach(llama(), "lora_ga", batches)
    other = llama()
    config, wrap = theirs(other, "lora_ga", lora_ga_config=LoraGAConfig(direction="ArB2r", scale="stable"))
    preprocess_loraga(other, config, lambda: [mean_loss(other, b).backward() for b in batches])
    other = wrap()
    for path, delta in adapter.deltas.items():
        layer = other.get_submodule(f"base_model.model.{path}")
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        units = [t / t.norm(dim=d, keepdim=True) for t, d in ((delta.A, 1), (A, 1), (delta.B, 0), (B, 0))]
        torch.testing.assert_close((units[0] @ units[1].T).abs(), torch.eye(R), rtol=0, atol=1e-2)
        torch.testing.assert_close((units[2].T @ units[3]).abs(), torch.eye(R), rtol=0, atol=1e-2)
        c = torch.tensor(32**0.25 / 16**0.5)  # lora_ga_init of Outsider565/LoRA-GA: on both factors
        torch.testing.assert_close(delta.A.norm(dim=1), c.expand(R))
        torch.testing.assert_close(delta.B.norm(dim=0), c.expand(R))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("method", ["lora_sb", "lora", "dora", "adalora"])
def test_lora_sb_starts_with_the_best_approximation_of_the_first_update(method, optimizer):
    model, _, _, stats, G = small()
    update = -0.03 * (G.sign() if optimizer == "adamw" else G)
    U, values, V = torch.linalg.svd(update, full_matrices=False)
    init = f"lora_sb,learning_rate=0.03,optimizer={optimizer}"
    more = {"target_rank": 2} if method == "adalora" else {}
    delta = graft.attach(model, method, "0", rank=3, init=init, stats=stats, **more).deltas["0"]
    w = delta.site.weight.detach()
    torch.testing.assert_close(delta.weight(w) - w, U[:, :3] * values[:3] @ V[:3], rtol=0, atol=1e-6)


def test_lora_sb_steps_as_full_tuning_does_within_its_space():
    model, batch, loss, stats, G = small()
    delta = graft.attach(model, graft.LoRASB(rank=3, init="lora_sb,optimizer=sgd"), "0", stats=stats).deltas["0"]
    one = torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(delta.A @ delta.A.T, one, rtol=0, atol=1e-6)
    torch.testing.assert_close(delta.B.T @ delta.B, one, rtol=0, atol=1e-6)
    assert [name for name, p in delta.named_parameters() if p.requires_grad] == ["R"]
    values = torch.linalg.svdvals(G)
    best = (values[:3].norm() / values.norm()).item()
    with torch.no_grad():
        delta.R.zero_()  # at the base itself, where G was taken
    step = first_step(delta, loss(model, batch))
    assert cosine(step, -G) == pytest.approx(best, abs=1e-5)
    U, S, V = torch.linalg.svd(G, full_matrices=False)
    torch.testing.assert_close(step, -U[:, :3] * S[:3] @ V[:3], rtol=1e-3, atol=1e-6)


class Rounded(nn.Linear):
    """Weights in steps of 0.05, as a quantised layer has them."""


class RoundedSite(QuantisedSite, hosts=(Rounded,)):
    def decode(self):
        return (self.module.weight / 0.05).round() * 0.05


def test_loftq_makes_up_for_the_loss_of_a_quantised_base():
    torch.manual_seed(0)
    original = nn.Sequential(nn.Linear(10, 14)).double()
    coded = nn.Sequential(Rounded(10, 14)).double()
    coded.load_state_dict(original.state_dict())
    w = original[0].weight.detach()
    stats = graft.collect(original, (), ["weight"], "0")
    delta = graft.attach(coded, graft.LoRA(rank=3, init="loftq"), "0", stats=stats).deltas["0"]
    quantised = delta.site.weight.detach()
    lost = w - quantised
    assert lost.norm() > 0
    torch.testing.assert_close(
        (w - delta.weight(quantised)).norm(), torch.linalg.svdvals(lost)[3:].norm(), rtol=1e-5, atol=0
    )
    found = _low_rank_decomposition(lost, reduced_rank=3)
    torch.testing.assert_close(delta.scaling * delta.B @ delta.A, found["L"] @ found["R"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_peft_computes_the_same_from_a_lora_of_twice_the_rank(method, init, tmp_path):
    model = bert().double()
    adapter = move(graft.attach(model, method, "query", rank=3, rslora=True, init=init))
    y = model(tokens()).logits
    adapter.save(tmp_path / "peft", format="peft")
    assert {len(d.A if method == "lora" else d.low.A) for d in adapter.deltas.values()} == {3}  # which stays as it is
    other = peft.PeftModel.from_pretrained(bert().double(), tmp_path / "peft")
    assert other.peft_config["default"].r == 6
    torch.testing.assert_close(other(tokens()).logits, y)
    again = bert().double()
    graft.load(again, tmp_path / "peft")
    torch.testing.assert_close(again(tokens()).logits, y)
    adapter.save(tmp_path / "adapter.safetensors", format="lycoris")
    again = bert().double()
    graft.load(again, tmp_path / "adapter.safetensors")
    torch.testing.assert_close(again(tokens()).logits, y, rtol=1e-5, atol=1e-5)


def test_what_another_format_has_no_place_for_is_refused_and_converted(tmp_path):
    model = bert().double()
    adapter = move(graft.attach(model, graft.AdaLoRA(rank=3, target_rank=2, init="pissa"), "query"))
    y = model(tokens()).logits
    with pytest.raises(
        graft.GraftError, match=r"adalora at .* started from a part of the base, .*graft.convert makes a"
    ):
        adapter.save(tmp_path / "peft", format="peft")
    done = graft.convert(model, "default")
    torch.testing.assert_close(model(tokens()).logits, y, rtol=1e-5, atol=1e-5)
    done.adapter.save(tmp_path / "peft", format="peft")


def test_a_start_is_no_part_of_what_other_formats_keep(tmp_path):
    model = bert()
    adapter = move(graft.attach(model, graft.LoRA(rank=2, init="orthogonal"), "query"))
    adapter.save(tmp_path / "peft", format="peft")
    again = bert()
    assert graft.load(again, tmp_path / "peft").recipe.hyper["init"] == "random"
    torch.testing.assert_close(again(tokens()).logits, model(tokens()).logits)
