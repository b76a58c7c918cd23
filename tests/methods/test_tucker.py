"""The Tucker forms of LoRA (LoCon), LoHa and LoKr on convolutions, against LyCORIS, PEFT and the dense kernel."""

import copy

import peft
import pytest
import torch
from against_peft import both, fill, same
from peft_reference import Host
from torch import nn

import graft
from models import move

METHODS = {
    "lora": ("locon", "LoConModule", {"A": "lora_down.weight", "core": "lora_mid.weight", "B": "lora_up.weight"}),
    "loha": (
        "loha",
        "LohaModule",
        {f"{ours}{i}": f"hada_{theirs.format(i)}" for i in "12" for ours, theirs in
         (("A", "w{}_b"), ("B", "w{}_a"), ("core", "t{}"))},
    ),
    "lokr": ("lokr", "LokrModule", {"W1": "lokr_w1", "A2": "lokr_w2_b", "B2": "lokr_w2_a", "core2": "lokr_t2"}),
}  # fmt: skip
HOSTS = {
    "conv1d": lambda: (nn.Conv1d(4, 8, 3, padding=1), torch.randn(2, 4, 7)),
    "conv2d": lambda: (nn.Conv2d(4, 8, (2, 3), stride=(2, 1), padding=(0, 1)), torch.randn(2, 4, 7, 6)),
    "conv2d-grouped": lambda: (nn.Conv2d(8, 8, 3, groups=2, dilation=2), torch.randn(2, 8, 7, 8)),
    "conv2d-circular": lambda: (nn.Conv2d(4, 8, 3, padding=1, padding_mode="circular"), torch.randn(2, 4, 7, 6)),
    "conv3d": lambda: (nn.Conv3d(4, 8, (2, 1, 2)), torch.randn(2, 4, 4, 3, 4)),
}


def adapted(name, kind, rank=1):
    torch.manual_seed(0)
    host, x = HOSTS[kind]()
    model = Host(host.double())
    adapter = graft.attach(model, name, "host", rank=rank, alpha=3.0, tucker=True)
    return model, adapter, x.double()


def flat(t):
    return t.reshape(t.shape[:2]) if t.dim() > 2 and t.shape[2:].numel() == 1 else t


@pytest.mark.parametrize("kind", HOSTS)
@pytest.mark.parametrize("name", METHODS)
def test_is_lycoris(name, kind):
    module, cls, names = METHODS[name]
    lycoris = pytest.importorskip(f"lycoris.modules.{module}")
    model, adapter, x = adapted(name, kind)
    host = model.host
    plain = copy.deepcopy(host)
    plain.__class__ = host.host_class
    theirs = getattr(lycoris, cls)("host", plain, lora_dim=1, alpha=3, use_tucker=True).double()
    delta = adapter.deltas["host"]
    own = dict(delta.named_parameters())
    assert own.keys() == names.keys()
    with torch.no_grad():
        for ours, other in names.items():
            value = theirs.get_parameter(other)
            mine = own[ours]
            assert mine.any() == value.any()  # both start with a zero in the same place
            mine.copy_(torch.randn_like(mine))
            turned = mine.T if ours.startswith("B") and name != "lora" else mine
            value.copy_(turned.reshape(value.shape))
        change = theirs.make_weight() * theirs.scale if name == "lora" else theirs.get_weight(host.weight.shape)
        W = host.weight + change.view(host.weight.shape)
    torch.testing.assert_close(delta.weight(host.weight.flatten(1)), W.flatten(1))
    torch.testing.assert_close(model(x), plain._conv_forward(x, W, host.bias))


@pytest.mark.parametrize("kind", HOSTS)
@pytest.mark.parametrize("name, rank", [("lora", 3), ("loha", 1), ("loha", 3), ("lokr", 1)])
def test_activation_path_is_the_weight_path(name, rank, kind):
    model, adapter, x = adapted(name, kind, rank)
    move(adapter)
    delta, host = adapter.deltas["host"], model.host
    ours = model(x)
    dense = delta.site.apply(x, delta.weight(delta.site.weight), host.bias)
    torch.testing.assert_close(ours, dense)
    grads = torch.autograd.grad(ours.sin().sum(), adapter.parameters())
    for mine, other in zip(grads, torch.autograd.grad(dense.sin().sum(), adapter.parameters())):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("name, config", [("loha", peft.LoHaConfig), ("lokr", peft.LoKrConfig)])
def test_is_pefts_effective_convolution(name, config):
    torch.manual_seed(0)
    host, x = nn.Conv2d(4, 12, 3, stride=2, padding=1), torch.randn(2, 4, 7, 7, dtype=torch.float64)
    recipe = graft.METHODS[name](rank=1, alpha=3.0, tucker=True)
    ours, delta, layer = both(host, recipe, config(r=1, alpha=3, use_effective_conv2d=True))
    pairs = [(p, dict(getattr(layer, METHODS[name][2][n]))["default"]) for n, p in delta.named_parameters()]
    fill(pairs)  # of rank 1, transposed or not
    if name == "loha":  # PEFT's own backward of this form takes the wrong product for the gradient of B1
        torch.testing.assert_close(ours(x), layer(x))
    else:
        same(ours, layer, pairs, x)


@pytest.mark.parametrize("name", METHODS)
def test_has_the_parameters_of_its_form_and_leaves_matrices_as_they_are(name):
    wide = nn.ModuleDict({"conv": nn.Conv2d(64, 64, 3), "point": nn.Conv2d(64, 64, 1), "line": nn.Linear(64, 64)})
    count = lambda tucker: {
        path: sum(p.numel() for p in d.parameters())
        for path, d in graft.attach(copy.deepcopy(wide), name, list(wide), rank=2, tucker=tucker).deltas.items()
    }
    plain, tucker = count(False), count(True)
    assert tucker["conv"] < plain["conv"]
    assert {tucker[p] == plain[p] for p in ("point", "line")} == {True}
    if name == "lora":
        assert tucker["conv"] == 2 * 64 + 2 * 2 * 9 + 64 * 2


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("form", ["graft", "lycoris", "peft"])
def test_files_keep_the_form(name, form, tmp_path):
    torch.manual_seed(0)
    base = Host(nn.Conv2d(4, 8, 3, padding=1))
    model, x = copy.deepcopy(base), torch.randn(2, 4, 5, 5)
    adapter = move(graft.attach(model, name, "host", rank=1, tucker=True))
    file = tmp_path / ("a.safetensors" if form == "lycoris" else "a")
    if (name, form) == ("lora", "peft"):
        with pytest.raises(graft.GraftError, match="no counterpart of lora's tucker"):
            adapter.save(file, format=form)
        return
    adapter.save(file, format=form)
    again = copy.deepcopy(base)
    loaded = graft.load(again, file)
    assert {k: v.shape for k, v in loaded.state_dict().items()} == {k: v.shape for k, v in adapter.state_dict().items()}
    torch.testing.assert_close(again(x), model(x))
