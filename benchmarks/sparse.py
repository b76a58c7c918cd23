"""What training keeps and a switch costs with sparse adapters, beside full fine-tuning and LoRA, on the CPU.

    python benchmarks/sparse.py [width] [layers]

Bytes are counted, not sampled: parameters that are trained, their gradients, the optimizer's state, and what a forward
keeps for backward beside the base's weights. A switch is graft.merge and undo.
"""

import sys
import time

import torch
from torch import nn

import graft

METHODS = {
    "full": {},
    "lora": dict(rank=8),
    "shira": dict(density=0.01),
    "spiel": dict(density=0.01),
    "s2ft": dict(density=0.01),
    "smt": dict(density=0.01, size=64),
}


def main(width: int = 1024, layers: int = 8) -> None:
    torch.manual_seed(0)
    x = torch.randn(64, width)
    print(f"{layers} matrices of {width} x {width}, {len(x)} tokens, float32, {torch.get_num_threads()} threads")
    print(f"{'':8}{'trained':>12}{'gradient':>12}{'optimizer':>12}{'kept':>12}{'switch':>10}   bytes, ms")
    for name, hyper in METHODS.items():
        model = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))
        names, stats = [str(i) for i in range(layers)], None
        if name == "smt":
            stats = graft.collect(model, [x], ("weight_grad",), names, lambda m, b: m(b).square().mean())
        adapter = graft.attach(model, name, names, stats=stats, **hyper)
        trained = [p for p in adapter.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained)
        own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        kept = {}

        def pack(t, own=own, kept=kept):
            if t.untyped_storage().data_ptr() not in own:
                kept[t.untyped_storage().data_ptr()] = t.nbytes
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = model(x)
        y.square().mean().backward()
        optimizer.step()
        state = sum(t.nbytes for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t))
        times = []
        for _ in range(15):
            begun = time.perf_counter()
            graft.merge(model).undo()
            times.append(time.perf_counter() - begun)
        counts = sum(p.nbytes for p in trained), sum(p.grad.nbytes for p in trained), state, sum(kept.values())
        print(f"{name:8}" + "".join(f"{n:12,}" for n in counts) + f"{1e3 * min(times):10.1f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
