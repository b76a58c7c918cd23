"""Methods that train weights of a base in bfloat16: recomputing activations in the backward pass changes nothing."""

import pytest
import torch
from small import Tokenizer, rows

import graft
from graft import methods
from graft.core.delta import METHODS
from models import attach, llama

methods.load()
OURS = {n: cls for n, cls in METHODS.items() if cls.__module__.startswith("graft.")}
NAMES = sorted(n for n, cls in OURS.items() if ".selection." in cls.__module__ or not cls.on_codes)
WHOLE = ["full", "tangent"]  # at whole blocks, as lisa and surgical are
ROWS, TOKENIZER = rows(4), Tokenizer()


def trained(method, targets, checkpointing, dtype=torch.bfloat16):
    model = llama(dtype, attention_bias=True, mlp_bias=True)
    attach(model, method, "default", targets=targets)
    graft.fit(model, ROWS, processor=TOKENIZER, steps=1, batch_size=2, learning_rate=1e-2, keep="last",
              checkpointing=checkpointing, progress=False)  # fmt: skip
    return graft.adapters(model)["default"].state_dict()


@pytest.mark.parametrize("method, targets", [*((n, None) for n in NAMES), *((n, "blocks") for n in WHOLE)])
def test_a_run_that_recomputes_ends_at_the_same_bits(method, targets):
    plain, again = (trained(method, targets, checkpointing) for checkpointing in (False, True))
    assert plain.keys() == again.keys()
    assert all(torch.equal(plain[k], again[k]) for k in plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_copy_of_what_holds_blocks_that_recompute(dtype):
    plain, again = (trained("full", "model", checkpointing, dtype) for checkpointing in (False, True))
    assert all(torch.equal(plain[k], again[k]) for k in plain)


def test_blocks_that_recompute_inside_a_tangent_are_refused():
    with pytest.raises(graft.GraftError, match=r"^tangent at the model: .* adapt the blocks"):
        trained("tangent", "model", True)
