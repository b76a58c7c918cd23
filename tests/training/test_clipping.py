"""Component-wise clipping: each tensor by its own norm."""

import pytest
import torch
from torch import nn

import graft
from graft.core.errors import GraftError
from graft.training import loop
from graft.training.clipping import clip_components
from models import llama


def test_each_gradient_is_at_most_as_long_as_the_limit_and_keeps_its_direction():
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.zeros(3, 4)), nn.Parameter(torch.zeros(5)), nn.Parameter(torch.zeros(2))]
    grads = [10 * torch.randn(3, 4), 0.01 * torch.randn(5)]
    for p, g in zip(parameters, grads):
        p.grad = g.clone()
    clip_components(parameters, 0.5)
    torch.testing.assert_close(parameters[0].grad, grads[0] * 0.5 / grads[0].norm())
    assert torch.equal(parameters[1].grad, grads[1])  # under one norm for all it would have shrunk a hundredfold
    assert parameters[2].grad is None


def test_a_run_clips_as_it_is_told(monkeypatch):
    seen, clip = [], loop.clip_components

    def watched(parameters, limit):
        clip(parameters, limit)
        seen.append([p.grad.norm().item() for p in parameters])

    monkeypatch.setattr(loop, "clip_components", watched)
    data = [{"input_ids": [2, 3, 4, 5], "text": "2 3 4 5"}]
    from small import Tokenizer

    def run(**options):
        model = llama()
        graft.attach(model, graft.LoRA(rank=2), "q_proj")
        return graft.fit(model, [{"text": d["text"]} for d in data], processor=Tokenizer(), steps=2, progress=False,
                         precision="fp32", **options)  # fmt: skip

    run(clip=1e-4)
    assert not seen
    run(clip=1e-4, clip_by="component")
    norms = [n for step in seen for n in step]
    assert len(seen) == 2 and max(norms) == pytest.approx(1e-4, rel=1e-3) and sum(n > 0.9e-4 for n in norms) > 1
    with pytest.raises(GraftError, match="clip_by is 'global' or 'component', not 'layer'"):
        run(clip_by="layer")
