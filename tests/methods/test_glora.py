"""GLoRA: the sum of its five tensors, of every kind; LoRA, BitFit and a scaling are special cases; PEFT's layer."""

import itertools

import peft
import pytest
import torch
from against_peft import both, fill, same
from one_layer import adapted, linear

import graft

KINDS = [
    *itertools.product(["lora", "vector", "constant", "none"], ["lora", "vector", "none"], ["vector", "constant"]),
]


def value(delta, name):
    tensors = delta.of(name)
    return 0 if not tensors else tensors[0] @ tensors[1] if len(tensors) == 2 else tensors[0]


@pytest.mark.parametrize("a, b", itertools.product(["lora", "vector", "constant", "none"], repeat=2))
@pytest.mark.parametrize("c, d, e", [("lora", "vector", "constant"), ("vector", "none", "vector"), ("none",) * 3])
def test_is_the_sum_of_its_tensors(a, b, c, d, e):
    if {a, b, c, d, e} == {"none"}:
        return
    host = linear(7, 5)
    w, bias, x = host.weight.detach().clone(), host.bias.detach().clone(), torch.randn(4, 7, dtype=torch.float64)
    model, delta = adapted(host, graft.GLoRA(rank=2, a=a, b=b, c=c, d=d, e=e))
    A, B, C, D, E = (value(delta, name) for name in "ABCDE")
    prompt = 0 if c == "none" else (w @ C).flatten()
    torch.testing.assert_close(model(x), x @ (w + w * A + B).T + bias + bias * D + E + prompt)
    torch.testing.assert_close(delta.weight(w), w + w * A + B)


@pytest.mark.parametrize("ab, c, de", KINDS)
def test_equals_peft(ab, c, de):
    config = peft.GloraConfig(r=3, config_A_B=ab, config_C=c, config_D_E=de)
    ours, delta, theirs = both(linear(7, 5), graft.GLoRA(rank=3, a=ab, b=ab, c=c, d=de, e=de), config)
    pairs = [
        (p, getattr(getattr(theirs, f"glora_{n[0]}")["default"], {"": "X", "_down": "Xd", "_up": "Xu"}[n[1:]]))
        for n, p in delta.named_parameters()
    ]
    fill(pairs)
    same(ours, theirs, pairs, torch.randn(3, 4, 7, dtype=torch.float64))


def test_special_cases_are_other_methods():
    x = torch.randn(3, 7, dtype=torch.float64)
    none = dict.fromkeys("abcde", "none")
    one, lora = adapted(linear(7, 5), graft.LoRA(rank=3, alpha=3))
    two, glora = adapted(linear(7, 5), graft.GLoRA(rank=3, **none | {"b": "lora"}))
    with torch.no_grad():
        glora.B_down.copy_(lora.B)
        glora.B_up.copy_(lora.A)
    torch.testing.assert_close(one(x), two(x))
    two, glora = adapted(linear(7, 5), graft.GLoRA(**none | {"e": "vector"}))
    torch.testing.assert_close(two(x), linear(7, 5)(x) + glora.E)
    two, glora = adapted(linear(7, 5), graft.GLoRA(**none | {"a": "vector", "d": "vector"}))
    with torch.no_grad():
        glora.D.copy_(glora.A.flatten())
    torch.testing.assert_close(two(x), linear(7, 5)(x) * (1 + glora.D))


def test_without_a_bias_only_the_weight_is_changed():
    _, delta = adapted(linear(7, 5, bias=False), graft.GLoRA(rank=2))
    assert {n[0] for n, _ in delta.named_parameters()} == {"A", "B"}
    with pytest.raises(graft.GraftError, match="glora: nothing is left to train at 0: a or b must not be none there"):
        adapted(linear(7, 5, bias=False), graft.GLoRA(a="none", b="none"))
