"""Attention forward and backward on a CPU: torch's fused kernel against plain products, by length and type.

    python benchmarks/attention.py [--rounds 7]

The shape is that of graft:seedling with 16 rows: 6 heads of 64.
"""

import argparse

import torch
import torch.nn.functional as F

from harness import in_turns, machine, ratio, table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    rows = [
        {"type": str(dtype).removeprefix("torch."), "length": n, "fused / plain": measured(dtype, n, rounds)}
        for dtype in (torch.float32, torch.bfloat16)
        for n in (32, 64, 128, 256, 512)
    ]
    print(machine(), table(rows, list(rows[0])), sep="\n\n")


def measured(dtype: torch.dtype, length: int, rounds: int) -> float:
    q, k, v = (torch.randn(16, 6, length, 64, dtype=dtype, requires_grad=True) for _ in range(3))
    seen = torch.ones(length, length, dtype=torch.bool).tril().expand(16, 1, -1, -1)
    added = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)

    def fused():
        F.scaled_dot_product_attention(q, k, v, attn_mask=seen).sum().backward()

    def plain():
        scores = q @ k.mT * 64**-0.5 + added
        (scores.softmax(-1, dtype=torch.float32).to(dtype) @ v).sum().backward()

    return ratio(in_turns({"fused": fused, "plain": plain}, rounds), "fused", "plain")


if __name__ == "__main__":
    main()
