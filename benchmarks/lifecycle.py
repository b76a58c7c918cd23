"""Attach, switch, save, load, merge and detach, against PEFT, in one run.

python benchmarks/lifecycle.py [--adapters 32] [--json FILE]
"""

import argparse
import contextlib
import io
import json
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import peft
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import graft
from harness import machine, table

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8, vocab_size=1000
        )
    )


def timed(act) -> float:
    start = time.perf_counter()
    act()
    return (time.perf_counter() - start) * 1e3


def measure(count: int) -> list[dict]:
    graft.LoRA  # noqa: B018  the catalogue loads once a process; PEFT's is loaded by its import
    ours, theirs = base(), base()
    attach_ours, attach_theirs = [], []
    config = lambda: peft.LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS)
    made = []
    wrapped: list = []
    for i in range(count):
        attach_ours.append(
            timed(lambda i=i: made.append(graft.attach(ours, graft.LoRA(rank=8), TARGETS, name=f"a{i}")))
        )
        ours_only = made[-1]
        if i == 0:
            attach_theirs.append(
                timed(lambda: wrapped.append(peft.get_peft_model(theirs, config(), adapter_name="a0")))
            )
        else:
            attach_theirs.append(timed(lambda i=i: wrapped[0].add_adapter(f"a{i}", config())))
        graft.activate(ours, ours_only.name)
    model = wrapped[0]
    names = [f"a{i}" for i in range(count)]
    switch_ours = statistics.median(timed(lambda n=n: graft.activate(ours, n)) for n in names)
    switch_theirs = statistics.median(timed(lambda n=n: model.set_adapter(n)) for n in names)
    rows = [
        _row("attach the first", attach_ours[0], attach_theirs[0]),
        _row("attach the 2nd", attach_ours[1], attach_theirs[1]),
        _row("attach the 20th", attach_ours[19], attach_theirs[19]) if count >= 20 else None,
        _row(f"attach the last ({count})", attach_ours[-1], attach_theirs[-1]),
        _row(f"switch among {count}", switch_ours, switch_theirs),
    ]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        rows.append(
            _row(
                "save one",
                timed(lambda: made[0].save(f"{folder}/ours")),
                timed(lambda: model.save_pretrained(f"{folder}/theirs", selected_adapters=["a0"])),
            )
        )
        again, other = base(), base()
        assert load_file(Path(folder, "ours", "adapter_model.safetensors"))
        loads_ours = timed(lambda: graft.load(again, f"{folder}/ours"))
        loads_theirs = timed(lambda: wrapped.append(peft.PeftModel.from_pretrained(other, f"{folder}/theirs/a0")))
        rows.append(_row("load into a fresh model", loads_ours, loads_theirs))
        rows.append(
            _row(
                "load another",
                timed(lambda: graft.load(again, f"{folder}/ours", name="second")),
                timed(lambda: wrapped[-1].load_adapter(f"{folder}/theirs/a0", "second")),
            )
        )
    graft.activate(again, "a0")
    rows.append(_row("merge", timed(lambda: wrapped.append(graft.merge(again))), timed(other_merge(wrapped[1]))))
    rows.append(_row("undo the merge", timed(wrapped[-1].undo), timed(wrapped[1].unmerge_adapter)))
    rows.append(_row("detach one", timed(made[0].detach), timed(lambda: model.delete_adapter("a0"))))
    return [r for r in rows if r]


def other_merge(model):
    return lambda: model.merge_adapter(["default"])


def _row(what: str, ours: float, theirs: float) -> dict:
    return {"": what, "graft, ms": ours, "PEFT, ms": theirs, "graft / PEFT": ours / theirs}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=32)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows = measure(args.adapters)
    print(
        "LoRA of rank 8 on the 56 linear layers of a Llama of 8 layers, width 512. "
        f"{machine()}, peft {peft.__version__}\n"
    )
    print(table(rows, ["", "graft, ms", "PEFT, ms", "graft / PEFT"]))
    if args.json:
        args.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
