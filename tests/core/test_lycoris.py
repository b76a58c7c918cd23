"""LyCORIS's files and sd-scripts', both ways: what one library saves, the other loads, with equal outputs."""

import contextlib
import copy
import io
import logging
import warnings

import hypothesis.strategies as st
import lycoris
import pytest
import torch
from hypothesis import given, settings
from lycoris.modules.ia3 import IA3Module
from safetensors.torch import load_file, save_file
from torch import nn

import graft
from graft import GraftError
from models import bert, move, picture, tokens

logging.getLogger("LyCORIS").setLevel(logging.ERROR)


class Net(nn.Module):
    """Every kind of layer LyCORIS adapts, with sizes that divide in various ways."""

    def __init__(self, inputs=6, outputs=8, kernel=(3, 3), groups=1, dilation=1):
        super().__init__()
        self.line = nn.Linear(inputs, outputs)
        self.bare = nn.Linear(outputs, inputs, bias=False)
        self.conv = nn.Conv2d(inputs, 2 * inputs, kernel, padding=1, groups=groups, dilation=dilation)
        self.row = nn.Conv1d(2 * inputs, outputs, 3, stride=2)
        self.point = nn.Conv1d(outputs, outputs, 1, bias=False)
        self.norm = nn.LayerNorm(outputs)
        self.groups = nn.GroupNorm(2, outputs)

    def forward(self, x):  # [batch, 12, 5, inputs]
        x = self.bare(self.line(x).tanh())
        x = self.conv(x.movedim(-1, 1)).flatten(2)
        return self.groups(self.point(self.norm(self.row(x).mT).mT))


def net(**sizes):
    torch.manual_seed(0)
    return Net(**sizes).double().eval()


def inputs(model):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 12, 5, model.line.in_features, generator=generator, dtype=torch.float64)


def network(model, algo, **options):
    """LyCORIS's network on every module of `model`, moved away from its start."""
    options = {"linear_dim": 3, "linear_alpha": 2.0, "warn_on_unmatched": False} | options
    with quiet():
        made = lycoris.create_lycoris(model, 1.0, algo=algo, preset="full", **options)
        made.apply_to()
    made.to(next(iter(inputs_of(model))).dtype).eval()
    torch.manual_seed(2)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return made


def inputs_of(model):
    return list(model.parameters()) or [torch.zeros((), dtype=torch.float64)]


@contextlib.contextmanager
def quiet():
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def theirs_from(model, file):
    with quiet():
        made, _ = lycoris.create_lycoris_from_weights(1.0, str(file), model)
        made.to(torch.float64 if next(model.parameters()).dtype == torch.float64 else torch.float32)
        made.apply_to()
    return made.eval()


THERE = {
    "lora": ("lora", {}),
    "lora without scaling": ("lora", {"linear_alpha": 0}),
    "locon in Tucker form": ("locon", {"use_tucker": True}),
    "scalar": ("lora", {"use_scalar": True}),
    "rank-stabilised": ("lora", {"rs_lora": True}),
    "dora": ("lora", {"dora_wd": True}),
    "loha": ("loha", {}),
    "loha in Tucker form": ("loha", {"use_tucker": True}),
    "lokr": ("lokr", {"linear_dim": 1}),
    "lokr in Tucker form": ("lokr", {"linear_dim": 1, "use_tucker": True}),
    "lokr, both factors low-rank": ("lokr", {"linear_dim": 1, "decompose_both": True, "factor": 6}),
    "lokr, full factors": ("lokr", {"full_matrix": True}),
    "lokr by a factor": ("lokr", {"linear_dim": 1, "factor": 2}),
    "full": ("full", {}),
}


@pytest.mark.parametrize("algo, options", THERE.values(), ids=THERE)
def test_saved_there_loads_here(tmp_path, algo, options):
    base = net()
    theirs = copy.deepcopy(base)
    made = network(theirs, algo, **options)
    made.save_weights(str(tmp_path / "a.safetensors"), None, {})
    ours = copy.deepcopy(base)
    adapter = graft.load(ours, tmp_path / "a.safetensors")
    assert len(adapter.deltas) == len(made.loras) == 5
    torch.testing.assert_close(ours(inputs(ours)), theirs(inputs(base)), rtol=1e-6, atol=1e-6)
    assert (ours(inputs(ours)) - base(inputs(base))).abs().max() > 1e-2
