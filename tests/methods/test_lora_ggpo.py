"""LoRA-GGPO: a LoRA whose training is disturbed, by rows and by a closed form."""

import pytest
import torch
from torch import nn

import graft
from models import llama, move, tokens


def made(method, **hyper):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5)).double()
    adapter = graft.attach(model, method, "0", rank=2, alpha=3.0, **hyper)
    move(adapter)
    model.train()
    return model, adapter, torch.randn(4, 6, dtype=torch.float64)


def trained(model, adapter, x):
    model(x).square().sum().backward()
    adapter.step(0.5)
    return adapter.deltas["0"]


@pytest.mark.parametrize("init", ["random", "pissa"])
def test_the_deviation_is_its_formula(init):
    model, adapter, x = made("lora_ggpo", sigma=0.3, beta=0.2, init=init)
    delta = adapter.deltas["0"]
    assert not delta.deviation.any()
    trained(model, adapter, x)
    W = delta.weight(delta.site.weight)
    G = delta.scaling * (delta.B @ delta.A.grad + delta.B.grad @ delta.A)
    expect = (0.3 * W.norm(dim=1) + 0.2 * G.square().sum(1)) / 5**0.5
    torch.testing.assert_close(delta.deviation, expect.detach())


def test_the_noise_has_that_deviation_and_no_gradient():
    model, adapter, x = made("lora_ggpo", sigma=0.3, beta=0.0)
    delta = trained(model, adapter, x)
    model.eval()
    quiet = model(x)
    model.train()
    with torch.no_grad():
        draws = torch.stack([model(x) - quiet for _ in range(4000)])
    torch.testing.assert_close(draws.std(0), x.norm(dim=1)[:, None] * delta.deviation, rtol=0.06, atol=0)
    x.requires_grad_()
    (noisy,) = torch.autograd.grad(model(x).sum(), [x])
    model.eval()
    torch.testing.assert_close(noisy, torch.autograd.grad(model(x).sum(), [x])[0])


def test_without_noise_and_in_evaluation_it_is_lora_to_the_bit():
    plain, adapter, x = made("lora")
    trained(plain, adapter, x)
    for training, options in ((True, dict(sigma=0.0, beta=0.0)), (False, {})):
        model, own, _ = made("lora_ggpo", **options)
        trained(model, own, x)
        model.train(training)
        assert torch.equal(model(x), plain(x))
    model.train()
    assert not torch.equal(model(x), plain(x))


def test_a_run_goes_on_with_the_noise_it_had(tmp_path):
    model = llama()
    adapter = graft.attach(model, graft.LoRAGGPO(rank=2), "q_proj")
    model(tokens()).logits.square().mean().backward()
    adapter.step(0.1)
    assert all(d.deviation.all() for d in adapter.deltas.values())
    assert "model.layers.0.self_attn.q_proj:deviation" in adapter.state_dict()
    with pytest.raises(graft.GraftError, match=r"graft.convert makes a LoRA of it"):
        adapter.save(tmp_path / "peft", format="peft")
