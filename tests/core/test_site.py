"""Every kind of host behaves as its dense matrix says: down, up, apply, scale, shift, rows, columns, layout."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils import checkpoint

import graft
from graft.core.site import kind_of, site_for
from graft.core.sites.quantised import QuantisedSite

KINDS = ("linear", "conv", "embedding", "norm")
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
few = settings(max_examples=40, deadline=None)


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def shaken(module):
    """In float64, with parameters away from their start."""
    module = module.double().eval()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.5 * torch.randn_like(p))
    return module


def site_of(module):
    return site_for("host", module, KINDS)


class Int8(nn.Module):
    """A layer whose weight is a code: W = scale * code."""

    def __init__(self, d_in, d_out):
        super().__init__()
        self.in_features, self.out_features = d_in, d_out
        self.register_buffer("code", torch.randint(-127, 128, (d_out, d_in), dtype=torch.int8))
        self.register_buffer("scale", 0.01 * torch.rand(d_out, 1))
        self.bias = nn.Parameter(torch.randn(d_out))

    def forward(self, x):
        return F.linear(x, self.scale * self.code, self.bias)


class Int8Site(QuantisedSite, hosts=(Int8,)):
    def decode(self):
        return self.module.scale * self.module.code


@st.composite
def convolutions(draw):
    """(convolution, input)"""
    dims, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    kernel = draw(st.integers(1, 3))
    padding = draw(st.sampled_from([0, 1, "same"]))
    conv = CONVS[dims](
        groups * draw(st.integers(1, 2)),
        groups * draw(st.integers(1, 2)),
        kernel,
        stride=1 if padding == "same" else draw(st.integers(1, 2)),
        padding=padding,
        dilation=draw(st.integers(1, 2)),
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
    )
    batch = draw(st.sampled_from([(), (2,)]))
    return shaken(conv), normal(*batch, conv.in_channels, *[7] * dims)


@st.composite
def linears(draw):
    """(linear layer, input)"""
    d_in, d_out = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    if draw(st.booleans()):
        module = nn.Linear(d_in, d_out, bias=draw(st.booleans()))
    else:
        module = pytest.importorskip("transformers.pytorch_utils").Conv1D(d_out, d_in)
    return shaken(module), normal(*draw(st.sampled_from([(), (3,), (2, 3)])), d_in)


class Scaled(nn.Embedding):
    """As Gemma's: the output is scaled."""

    embed_scale = torch.tensor(3.0)

    def forward(self, x):
        return super().forward(x) * self.embed_scale


@st.composite
def embeddings(draw):
    """(embedding, input)"""
    vocabulary, dim = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    return shaken(draw(st.sampled_from([nn.Embedding, Scaled]))(vocabulary, dim)), torch.randint(vocabulary, (2, 3))


matrices = st.one_of(linears(), convolutions(), embeddings())


@few
@given(matrices, st.integers(1, 4))
def test_the_site_is_the_map_of_its_matrix(case, k):
    module, x = case
    site = site_of(module)
    y, w, b = module(x), site.weight, site.bias
    assert w.shape == (site.d_out, site.d_in)
    torch.testing.assert_close(site.apply(x, w, b), y)
    a, up = normal(k, site.d_in), normal(site.d_out, k)
    dense = site.apply(x, up @ a)
    torch.testing.assert_close(site.up(site.down(x, a), up), dense)
    torch.testing.assert_close(site.add_up(y, site.down(x, a), up), y + dense)
    v = normal(k)
    torch.testing.assert_close(site.up(site.scale(site.down(x, a), v), up), site.apply(x, (up * v) @ a))


@few
@given(matrices)
def test_vectors_over_channels_are_factors_of_the_matrix(case):
    module, x = case
    site = site_of(module)
    y, w, b = module(x), site.weight, site.bias
    v = normal(site.d_out)
    zero = torch.zeros_like(w)
    if site.kind != "embedding":
        torch.testing.assert_close(site.shift(site.apply(x, zero), v), site.apply(x, zero, v))
    torch.testing.assert_close(site.scale(y, v), site.apply(x, site.rows(v) * w, b if b is None else v * b))
    torch.testing.assert_close(site.scale(y, 2.5), 2.5 * y)
    if site.kind != "embedding":
        v = normal(site.inputs)
        torch.testing.assert_close(module(site.scale(x, v)), site.apply(x, site.columns(v) * w, b))


@few
@given(matrices)
def test_layout_is_what_the_host_loads(case):
    module, x = case
    site = site_of(module)
    w, b = normal(site.d_out, site.d_in), None if site.bias is None else normal(site.d_out)
    twin = copy.deepcopy(module)
    twin.load_state_dict(site.layout(w, b))
    torch.testing.assert_close(twin(x), site.apply(x, w, b))


@few
@given(matrices, st.booleans())
def test_a_formed_matrix_is_applied_with_its_gradients(case, grown):
    """Values and gradients of x, w, b and the tensors are those of apply; integer tensors take part."""
    module, x = case
    site = site_of(module)
    w = site.weight.detach().clone().requires_grad_(grown)
    b = None if site.bias is None else site.bias.detach().clone().requires_grad_()
    values, index = normal(2).requires_grad_(), torch.tensor([0, w.numel() - 1])
    inputs = [t for t in (x, w, b, values) if t is not None and t.is_floating_point()]
    if x.is_floating_point():
        x.requires_grad_()

    def form(w, values, index):
        return w.flatten().index_add(0, index, values.square()).view(w.shape)

    inputs = [t for t in inputs if t.requires_grad]
    y, expect = site.apply_formed(x, form, w, b, values, index), site.apply(x, form(w, values, index), b)
    torch.testing.assert_close(y, expect)
    for ours, theirs in zip(*(torch.autograd.grad(v.sin().sum(), inputs) for v in (y, expect))):
        torch.testing.assert_close(ours, theirs)


def test_a_formed_matrix_is_not_kept():
    module, x = nn.Linear(64, 48), torch.randn(4, 64, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        site_of(module).apply_formed(
            x, lambda w, v: w * v, module.weight, module.bias, torch.ones((), requires_grad=True)
        )
    assert {t.data_ptr() for t in kept if t.numel() >= 64 * 48} == {module.weight.data_ptr()}


def test_a_frozen_formed_matrix_passes_the_gradient_on():
    module, x = shaken(nn.Linear(5, 4)), normal(3, 5).requires_grad_()
    w = module.weight.detach()
    y = site_of(module).apply_formed(x, lambda w, v: w * v, w, None, normal(4, 1))
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert grad.shape == x.shape and grad.abs().sum() > 0


class Rms(nn.Module):
    """An RMS norm; Gemma's keeps g - 1, Llama's g."""

    def __init__(self, dim, offset):
        super().__init__()
        self.weight, self.offset = nn.Parameter(torch.zeros(dim)), offset

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (self.offset + self.weight)


class RmsNorm(Rms):
    pass


class LayerNorm2d(nn.LayerNorm):
    """Channels in axis 1, as in ConvNeXt."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


NORMS = {
    "LayerNorm": (lambda: nn.LayerNorm(4), (2, 3, 4)),
    "LayerNorm without bias": (lambda: nn.LayerNorm(4, bias=False), (2, 4)),
    "RMSNorm": (lambda: nn.RMSNorm(4), (2, 3, 4)),
    "Llama's": (lambda: RmsNorm(4, 0), (2, 3, 4)),
    "Gemma's": (lambda: RmsNorm(4, 1), (2, 3, 4)),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), (2, 4, 5, 4)),
    "BatchNorm of features": (lambda: nn.BatchNorm1d(4), (3, 4)),
    "BatchNorm of images": (lambda: nn.BatchNorm2d(4), (3, 4, 5, 4)),
    "InstanceNorm": (lambda: nn.InstanceNorm1d(4, affine=True), (3, 4, 4)),
    "LayerNorm of images": (lambda: LayerNorm2d(4), (2, 4, 4, 4)),
}


@pytest.mark.parametrize("name", NORMS)
def test_a_norm_is_its_gain_and_bias(name):
    make, shape = NORMS[name]
    module, x = shaken(make()), normal(*shape)
    site = site_of(module)
    assert site.kind == "norm"
    y, g, b = module(x), site.weight, site.bias
    torch.testing.assert_close(site.apply(x, g, b), y)
    torch.testing.assert_close(site.apply(x, torch.zeros_like(g), b if b is None else 0 * b), 0 * y)
    v = normal(4)
    torch.testing.assert_close(site.scale(y, v), site.apply(x, site.rows(v) * g, b if b is None else v * b))
    if b is not None:
        torch.testing.assert_close(site.shift(y, v), site.apply(x, g, b + v))
    twin, gain, bias = copy.deepcopy(module), normal(4), b if b is None else normal(4)
    twin.load_state_dict(module.state_dict() | site.layout(gain, bias))
    torch.testing.assert_close(twin(x), site.apply(x, gain, bias))


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_norm_keeps_its_output_dtype_beside_a_float32_gain(name, dtype):
    make, shape = NORMS[name]
    module, x = make().eval().to(dtype), torch.randn(shape).to(dtype)
    site = site_of(module)
    y = site.apply(x, site.weight.float(), None if site.bias is None else site.bias.float())
    assert y.dtype == module(x).dtype == dtype
    torch.testing.assert_close(y, module(x))


def test_a_norm_of_unknown_make_is_refused_by_name():
    class StrangeNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, x):
            raise ValueError("only on Tuesdays")

    with pytest.raises(graft.GraftError, match="host: StrangeNorm is no norm that can be run on features alone"):
        site_of(StrangeNorm())


def test_a_quantised_host_is_the_map_of_its_decoded_matrix_and_is_not_rewritten():
    module, x = Int8(6, 5), torch.randn(3, 6)
    site = site_of(module)
    assert kind_of(module) == "linear"
    torch.testing.assert_close(site.apply(x, site.weight, site.bias), module(x))
    a, b = torch.randn(2, site.d_in), torch.randn(site.d_out, 2)
    torch.testing.assert_close(site.up(site.down(x, a), b), x @ (b @ a).T)
    with pytest.raises(
        graft.GraftError, match=r"host is quantised \(Int8\), and codes cannot take a change: graft.deq"
    ):
        site.layout(site.weight, site.bias)


@pytest.mark.parametrize("method", ["lora", "hra", "oft", "ia3", "miss"])
def test_activation_paths_never_decode_a_quantised_host(method, monkeypatch):
    model, x = nn.Sequential(Int8(8, 4)), torch.randn(3, 8)
    hyper = {"oft": {"block": 4}, "miss": {"rank": 4}, "hra": {"rank": 2}}.get(method, {})
    adapter = graft.attach(model, method, "0", **hyper)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn_like(p))
    delta = adapter.deltas["0"]
    expect = F.linear(x, delta.weight(delta.site.weight), delta.bias(model[0].bias))
    monkeypatch.setattr(Int8Site, "decode", lambda self: pytest.fail("the weight was decoded"))
    y = checkpoint.checkpoint(model, x, use_reentrant=False)
    y.sum().backward()
    torch.testing.assert_close(y, expect)


def test_a_container_runs_past_the_deltas_it_carries():
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh())
    x = torch.randn(2, 4)
    y = model(x)
    adapter = graft.attach(nn.Sequential(model), "full", "0")
    assert isinstance(model, nn.Sequential) and torch.equal(model(x), y)
    with adapter.disabled():
        assert torch.equal(model(x), y)
