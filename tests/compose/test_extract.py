"""An adapter from two checkpoints: what it computes, what it keeps where, and what it says is lost."""

import pytest
import torch
from test_combine import change, lost, norm
from torch import nn

import graft
from models import bert, gpt2, llama, move, picture, tokens

IDS = tokens()


def trained(model, *, touch=lambda name: True, seed=5, by=0.05):
    """The model after a training of all parameters that `touch` takes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            step = by * torch.randn(p.shape, generator=generator, dtype=p.dtype)
            p.add_(step if touch(name) else 0)
    return model


def differences(base, tuned):
    before, after = base.state_dict(), tuned.state_dict()
    return {k: after[k] - before[k] for k in before}


@pytest.mark.parametrize("make", [llama, gpt2, bert])
@pytest.mark.parametrize("tie", [False, True])
def test_a_whole_fine_tuning_comes_back(make, tie):
    model, tuned = make(tie_word_embeddings=tie).double(), trained(make(tie_word_embeddings=tie).double())
    before = picture(model)
    done = graft.extract(model, tuned)
    assert done.exact and done.error == 0 and done.adapter.recipe.method.name == "full"
    torch.testing.assert_close(model(IDS).logits, tuned(IDS).logits)
    done.adapter.detach()
    assert picture(model) == before


def test_what_a_lora_did_is_found_again():
    model, tuned = llama(torch.float64), llama(torch.float64)
    move(graft.attach(tuned, graft.LoRA(rank=3, rslora=True), "qv"))
    done = graft.extract(model, tuned, rank=3)
    assert done.exact
    assert {path.rpartition(".")[2] for path in done.adapter.deltas} == {"q_proj", "v_proj"}
    assert done.adapter.recipe.hyper["rank"] == 3
    torch.testing.assert_close(model(IDS).logits, tuned(IDS).logits)
    graft.merge(tuned).keep()
    done.adapter.detach()
    assert graft.extract(model, tuned.state_dict(), rank=3).exact
    torch.testing.assert_close(model(IDS).logits, tuned(IDS).logits)


@pytest.mark.parametrize("rank", [1, 4])
def test_a_lora_is_the_nearest_one_and_all_else_is_kept_whole(rank):
    model, tuned = bert().double(), trained(bert().double())
    asked = differences(model, tuned)
    done = graft.extract(model, tuned, rank=rank, heads="classifier")
    found = change(model, "extracted")
    for path, delta in done.adapter.deltas.items():
        own = asked[f"{path}.weight"]
        if isinstance(delta, graft.LoRA):
            missing = torch.linalg.svdvals(own)[rank:].norm()
            torch.testing.assert_close((own - found[f"{path}.weight"]).norm(), missing)
        else:
            torch.testing.assert_close(found[f"{path}.weight"], own)
        if f"{path}.bias" in asked:
            torch.testing.assert_close(found[f"{path}.bias"], asked[f"{path}.bias"])
    heads = [path for path, _ in done.adapter.heads]
    assert "classifier" in heads and all("LayerNorm" in path for path in heads if path != "classifier")
    assert done.error == pytest.approx(lost(found, asked)) and not done.exact


def test_only_the_entries_that_changed_are_kept_as_shira():
    model, tuned = llama(torch.float64), llama(torch.float64)
    weight = tuned.model.layers[1].mlp.up_proj.weight
    with torch.no_grad():
        weight[3, 4] += 1
        weight[5, 6] -= 2
    done = graft.extract(model, tuned, into="shira")
    assert done.exact
    (delta,) = done.adapter.deltas.values()
    assert delta.value.tolist() == [1, -2] and delta.index.tolist() == [3 * 32 + 4, 5 * 32 + 6]


def test_what_targets_leave_out_counts_as_lost():
    model, tuned = llama(torch.float64), trained(llama(torch.float64))
    asked = differences(model, tuned)
    done = graft.extract(model, tuned, targets="qv")
    assert {path.rpartition(".")[2] for path in done.adapter.deltas} == {"q_proj", "v_proj"}
    found = change(model, "extracted")
    assert not done.exact and done.error == pytest.approx(lost(found, asked))
    assert done.errors["model.norm.weight"] == 1 and done.errors["model.layers.0.self_attn.q_proj"] == 0


class WithToken(nn.Module):
    """A parameter beside the matrices, as the class token of a vision transformer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.token, self.map, self.norm = nn.Parameter(torch.zeros(4)), nn.Linear(4, 3), nn.BatchNorm1d(3)

    def forward(self, x):
        return self.norm(self.map(x + self.token))


def test_a_parameter_that_no_module_with_a_matrix_owns_is_declared_lost():
    model, tuned = WithToken().eval(), trained(WithToken().eval())
    done = graft.extract(model, tuned)
    assert done.errors == {"map": 0, "norm": 0, "token": 1}
    found = norm(differences(WithToken(), tuned))
    assert done.error == pytest.approx(norm({"token": tuned.token.detach()}) / found)


def test_running_statistics_come_with_a_module_that_is_kept_whole_and_count_as_lost_with_a_norm():
    model, tuned = nn.Sequential(WithToken()).eval(), nn.Sequential(WithToken())
    with torch.no_grad():
        tuned(torch.randn(50, 4))
        tuned[0].norm.weight.mul_(2)
    tuned.eval()
    x, steps = torch.randn(5, 4), differences(model, tuned)
    done = graft.extract(model, tuned)
    assert done.errors == {"0.norm": 0, "0.norm.running_mean": 1, "0.norm.running_var": 1}
    statistics = {k: v for k, v in steps.items() if "running" in k}
    steps.pop("0.norm.num_batches_tracked")
    assert done.error == pytest.approx(norm(statistics) / norm(steps))
    done.adapter.detach()
    assert graft.extract(model, tuned, heads="0").exact
    torch.testing.assert_close(model(x), tuned(x))


def test_precision_is_that_of_the_wider_of_both():
    model, tuned = llama(torch.bfloat16), trained(llama(torch.bfloat16).float(), by=1e-4)
    done = graft.extract(model, tuned)
    after = tuned.state_dict()
    for path, delta in done.adapter.deltas.items():
        torch.testing.assert_close(delta.copy.weight, after[f"{path}.weight"])


def test_refusals():
    model = bert()
    with pytest.raises(graft.GraftError, match="do not differ: there is nothing to extract"):
        graft.extract(model, bert())
    with pytest.raises(
        graft.GraftError, match=r"classifier.weight has shape \[3, 32\] here and \[5, 32\] in the tuned"
    ):
        graft.extract(model, bert(labels=5))
    with pytest.raises(graft.GraftError, match=r"the tuned model lacks bert\.embeddings.word_embeddings.weight"):
        graft.extract(model, llama())
    assert not graft.adapters(model)


def test_what_is_extracted_is_saved_and_loaded(tmp_path):
    model, tuned = bert().double(), trained(bert().double())
    done = graft.extract(model, tuned, rank=2, heads="classifier")
    y = model(IDS).logits
    done.adapter.save(tmp_path / "adapter")
    done.adapter.detach()
    graft.load(model, tmp_path / "adapter", name="again")
    assert torch.equal(model(IDS).logits, y)
