"""transformers 4.57 sets `forward` on modules while it records hidden states, and leaves it there."""

import pytest
import torch

import graft
from models import llama, tokens

pytest.importorskip("transformers")


def test_recorded_hidden_states_outlive_the_adapter():
    model, ids = llama(), tokens()
    base = model(ids).logits
    adapter = graft.attach(model, "houlsby", r"layers\.\d(\.mlp)?", size=2)
    states = model(ids, output_hidden_states=True).hidden_states
    assert len(states) == 3
    adapter.detach()
    assert "forward" not in model.model.layers[0].__dict__
    assert torch.equal(model(ids).logits, base)
    torch.testing.assert_close(model(ids, output_hidden_states=True).hidden_states[0], states[0])
