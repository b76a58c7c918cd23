"""What every method of the catalogue costs: time, memory, parameters, file and loading, beside LoRA and beside PEFT.

    python benchmarks/catalogue.py [METHOD ...] [--rounds 5] [--json benchmarks/catalogue.json]
    python docs/generate.py      # writes docs/costs.md from that file

Without METHOD all of the catalogue are measured; the rows of those named replace theirs in the file. Each method has
its default hyperparameters and targets on a small Llama (width 512, 2 layers, 4 x 128 tokens, one thread). PEFT's tuner
of a method is what PEFT makes of our adapter in its format, with the same hyperparameters and tensors. Per method, in
a process of its own:

step    forward, backward, the method's own schedule and AdamW, in seconds of the processor, which neighbours on the
        machine disturb less than the clock on the wall; the median over rounds of the ratio to a LoRA step in the same
        round
kept    bytes that autograd keeps for backward beside parameters and buffers; counted
peak    the most bytes that the first step has allocated at a time beside the base and the adapter: activations,
        gradients, the state of the optimizer and what is made on the way; counted
trained parameters that get a gradient; `file` is the size of the saved tensors
load    graft.load and detach, in seconds of the processor, and the ratio to LoRA's; PEFT's without taking it off
"""

import argparse
import gc
import json
import multiprocessing
import statistics
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import graft
from graft import methods
from graft.catalogue import catalogue
from graft.core import formats
from graft.core.delta import METHODS
from graft.training.optimizers import forget
from harness import in_turns, kept_for_backward, machine, most_allocated, ratio

SIZES = dict(
    hidden_size=512, intermediate_size=1536, num_hidden_layers=2, num_attention_heads=8, vocab_size=1000,
    attention_bias=True, use_cache=False,
)  # fmt: skip
TOKENS = (4, 128)
OPTIONS = {"tokens": dict(tokens=tuple(range(8)))}  # where a method has no default
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FILE = "adapter_model.safetensors"


def base(dtype: torch.dtype) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).to(dtype).train()


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(0, SIZES["vocab_size"], TOKENS, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


def adapted(name: str, dtype: torch.dtype) -> graft.Adapter:
    model, cls = base(dtype), METHODS[name]
    recipe = cls(**OPTIONS.get(name, {}))
    needs = cls.asks(recipe.hyper)
    stats = graft.collect(model, [batch()], needs, cls.targets) if needs else None
    return graft.attach(model, recipe, stats=stats)


def step_of(model: nn.Module, adapter: graft.Adapter | None, steps: int):
    """(the forward alone, a whole step); PEFT has no `adapter`."""
    data, done = batch(), 0
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    allocate = getattr(getattr(model, "base_model", None), "update_and_allocate", None)  # PEFT's AdaLoRA

    def forward():
        return model(**data).loss

    def step():
        nonlocal done
        loss = forward()
        if adapter is not None and (penalty := adapter.penalty()) is not None:
            loss = loss + penalty
        loss.backward()
        if adapter is not None:
            forget(optimizer, adapter.step(done / steps))
        elif allocate is not None:
            allocate(done)
        optimizer.step()
        optimizer.zero_grad()
        done = min(done + 1, steps)

    return forward, step


def peft_model(folder: Path, dtype: torch.dtype) -> nn.Module:
    import peft

    prompts = peft.PeftConfig.from_pretrained(folder).is_prompt_learning  # which PEFT loads as frozen only
    model = peft.PeftModel.from_pretrained(base(dtype), folder, is_trainable=not prompts).train()
    for name, parameter in model.named_parameters():
        if prompts and "prompt_encoder" in name:
            parameter.requires_grad_()
    return model


def measure(name: str, rounds: int) -> dict:
    """The row of one method."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    methods.load()
    formats.load()
    row: dict = {"method": name, "rounds": rounds, "machine": machine(1)}
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        for precision, dtype in DTYPES.items():
            adapters = {"graft": adapted(name, dtype), "lora": adapted("lora", dtype)}
            models = {label: adapter.model for label, adapter in adapters.items()}
            if precision == "fp32":
                for label, adapter in adapters.items():
                    adapter.save(folder / label)
                row["trained"] = sum(p.numel() for p in adapters["graft"].parameters() if p.requires_grad)
                row["file"] = (folder / "graft" / FILE).stat().st_size
                row["PEFT"] = _in_peft(adapters["graft"], folder / "PEFT")
            if row["PEFT"] == "yes":
                models["PEFT"] = peft_model(folder / "PEFT", dtype)
            row[precision] = _training(models, adapters, rounds)
            del adapters, models
            gc.collect()
        row["load"] = _loading(folder, row["PEFT"] == "yes", rounds)
    return row


def _in_peft(adapter: graft.Adapter, folder: Path) -> str:
    """Writes it in PEFT's format: "yes", or why not."""
    stored = formats.FORMATS["peft"].stored(METHODS[adapter.recipe.method.name])
    if stored is None or isinstance(stored, str):
        return stored or "PEFT lacks it"
    try:
        adapter.save(folder, format="peft")
    except graft.GraftError as error:
        return str(error)
    return "yes"


def _training(models: dict, adapters: dict, rounds: int) -> dict:
    warmup, found, steps = 1, {}, {}
    for label, model in models.items():
        forward, steps[label] = step_of(model, adapters.get(label), rounds + warmup + 1)
        found[label] = {"kept": kept_for_backward(model, forward), "peak": most_allocated(steps[label])}
    times = in_turns(steps, rounds, warmup, time.process_time)
    for label in found:
        found[label]["step"] = ratio(times, label, "lora")
    found["lora"]["seconds"] = statistics.median(times["lora"])
    if "PEFT" in found:
        found["PEFT"]["graft / PEFT"] = ratio(times, "graft", "PEFT")
    return found


def _loading(folder: Path, peft: bool, rounds: int) -> dict:
    model = base(torch.float32)

    def loading(label):
        return lambda: graft.load(model, folder / label).detach()

    steps = {label: loading(label) for label in ("graft", "lora")}
    times = in_turns(steps, rounds, 1, time.process_time)
    found = {"seconds": statistics.median(times["graft"]), "ratio": ratio(times, "graft", "lora")}
    if peft:
        from peft import PeftModel

        loaded = []
        for _ in range(3):
            model = base(torch.float32)
            start = time.process_time()
            PeftModel.from_pretrained(model, folder / "PEFT")
            loaded.append(time.process_time() - start)
        found["PEFT seconds"] = statistics.median(loaded)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, default=Path(__file__).with_name("catalogue.json"))
    args = parser.parse_args()
    rows: dict[str, dict] = {}
    names = args.methods or [m["name"] for m in catalogue()]
    if args.methods and args.json.exists():
        rows = {row["method"]: row for row in json.loads(args.json.read_text())}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "peft"])
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        for name in track(names, "measuring ", transient=True, console=Console(stderr=True)):
            rows[name] = row = pool.submit(measure, name, args.rounds).result()
            args.json.write_text(json.dumps([rows[n] for n in sorted(rows)], indent=1) + "\n")
            print(
                name,
                *(f"{p} {_short(row[p])}" for p in DTYPES),
                f"file {row['file'] / 4 / row['trained']:.2f}",
                flush=True,
            )


def _short(found: dict) -> str:
    parts = [f"{label} {found[label]['step']:.2f}" for label in ("graft", "PEFT") if label in found]
    return ", ".join(parts)


if __name__ == "__main__":
    main()
