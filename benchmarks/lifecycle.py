"""Attach, switch, save, load, merge and detach, against PEFT, in one run.

python benchmarks/lifecycle.py [--adapters 32] [--rounds 7] [--json FILE]
"""

import argparse
import contextlib
import gc
import io
import json
import statistics
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path

import peft
import torch
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
    rows.append(_row("detach one", timed(made[0].detach), timed(lambda: model.delete_adapter("a0"))))
    return [r for r in rows if r]


def measure_files(rounds: int) -> list[dict]:
    """Saving, loading and merging one adapter: medians over rounds in turns, each on fresh models."""
    times: dict[str, tuple[list[float], list[float]]] = {}

    def record(what: str, ours, theirs) -> None:
        both = times.setdefault(what, ([], []))
        both[0].append(timed(ours))
        both[1].append(timed(theirs))

    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        adapter = graft.attach(base(), graft.LoRA(rank=8), TARGETS)
        wrapped = peft.get_peft_model(base(), config)
        for i in range(rounds):
            ours, theirs = f"{folder}/ours{i}", f"{folder}/theirs{i}"
            record("save", partial(adapter.save, ours), partial(wrapped.save_pretrained, theirs))
            mine, other, kept = base(), base(), []
            gc.collect()
            record(
                "load into a fresh model",
                partial(graft.load, mine, ours),
                lambda other=other, theirs=theirs, kept=kept: kept.append(
                    peft.PeftModel.from_pretrained(other, theirs)
                ),
            )
            loaded = kept[0]
            record(
                "load another beside it",
                partial(graft.load, mine, ours, name="second"),
                partial(loaded.load_adapter, theirs, "second"),
            )
            graft.activate(mine, "default")
            record("merge", lambda mine=mine, kept=kept: kept.append(graft.merge(mine)), loaded.merge_adapter)
            record("undo the merge", kept[-1].undo, loaded.unmerge_adapter)
    return [_row(what, statistics.median(a), statistics.median(b)) for what, (a, b) in times.items()]


def load_theirs(model, folder: str, kept: list) -> None:
    kept.append(peft.PeftModel.from_pretrained(model, folder))


def _row(what: str, ours: float, theirs: float) -> dict:
    return {"": what, "graft, ms": ours, "PEFT, ms": theirs, "graft / PEFT": ours / theirs}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7, help="of saving, loading and merging")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows = measure_files(args.rounds) + measure(args.adapters)
    print(
        "LoRA of rank 8 on the 56 linear layers of a Llama of 8 layers, width 512. "
        f"{machine()}, peft {peft.__version__}\n"
    )
    print(table(rows, ["", "graft, ms", "PEFT, ms", "graft / PEFT"]))
    if args.json:
        args.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
