"""The main job on real input: a real pre-trained encoder learns which chapter of the library reference a docstring of
Python's standard library belongs to. A LoRA adapter against the tuned linear probe on the frozen encoder.
"""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .core.errors import GraftError
from .core.recipe import Recipe
from .models import load_base
from .tasks import SPLITS
from .tasks.chapters import Chapters
from .training import predict
from .training.report import PeakMemory
from .tuning import tune

BASE = "graft:minilm"
METHOD: dict[str, Any] = {"rank": 8, "alpha": 16.0}
# A first sensible choice, not a tuned one. Probe and adapter see the same texts, cut at 64 tokens.
TRAINING: dict[str, Any] = {
    "epochs": 3,
    "batch_size": 32,
    "learning_rate": 2e-3,
    "head_learning_rate": 1e-2,
    "max_length": 64,
}
REPORT = "demo.json"


@dataclass
class Contestant:
    """One row of the result: accuracies in percent, bytes, seconds."""

    name: str
    test_accuracy: float
    trained_parameters: int
    step_seconds: float | None  # one batch of training; of the probe: of embedding, which it does once a text
    total_seconds: float
    peak_memory: int | None
    settings: dict[str, Any]


def demo(
    output: str | Path = "runs/demo", *, seed: int = 0, say: Callable[[str], None] = print, quick: bool = False
) -> dict:
    """Run it, write the adapter, the test predictions and demo.json into `output`, and return the report.

    seed   of the split, of the start of the adapter and of the order of the data
    say    told what happens
    quick  only a few texts and steps, to see that all parts work: the accuracies mean nothing

    The adapter is loaded by a new process, which predicts the test texts again: the report tells how many of its
    labels and probabilities are the same.
    """
    place = Path(output).expanduser()
    if place.exists():
        if not (place / REPORT).is_file():
            raise GraftError(f"{place} exists and is not from an earlier demo: choose another --output")
        shutil.rmtree(place)
    place.mkdir(parents=True)
    (place / REPORT).write_text("{}\n")  # this folder is ours, also when the demo is stopped
    begun = time.perf_counter()
    data = Chapters(seed=seed)
    train, validation, test = (data.rows(split)[: 64 if quick else None] for split in SPLITS)
    say(
        f"{len(train):,} docstrings of the standard library to learn from, {len(validation):,} to choose the probe's "
        f"settings, {len(test):,} to test with; {len(data.labels)} chapters. No text and no object is in two parts."
    )
    dtype = faster_dtype()
    say(f"The encoder computes in {dtype} on {torch.get_num_threads()} threads, which is the faster one here.")
    say("Linear probe: the frozen encoder embeds each text once, logistic regression learns on the embeddings.")
    probe = linear_probe(train, validation, test, data.labels, dtype)
    say(f"  {probe.test_accuracy:.1f} % of the test texts ({probe.total_seconds:.0f} s)")

    say("LoRA: two small matrices beside each linear layer, and the same linear classifier, learn together.")
    start = time.perf_counter()
    settings: dict[str, Any] = TRAINING | ({"epochs": 1} if quick else {})
    tuned = tune(
        BASE, train, method=Recipe.of("lora", **METHOD), labels=data.labels, output=place / "adapter", seed=seed,
        dtype=dtype, **settings,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    ours = _predict(tuned.base, test)
    lora = Contestant(
        "LoRA adapter", _accuracy(ours, test), sum(p.numel() for p in tuned.adapter.parameters()),
        tuned.result.step_seconds, seconds, tuned.result.peak_memory, METHOD | TRAINING,
    )  # fmt: skip
    say(f"  {lora.test_accuracy:.1f} % of the test texts ({lora.total_seconds:.0f} s)")

    say("A new process loads the saved adapter and predicts the test texts again.")
    again = predict_anew(place, test, dtype)
    labels = sum(a["label"] == b["label"] for a, b in zip(ours, again))
    bits = sum(a == b for a, b in zip(ours, again))
    say(f"  {labels:,} of {len(test):,} labels are the same, {bits:,} probabilities to the last bit")
    report = {
        "chapters": list(data.labels),
        "texts": {"train": len(train), "validation": len(validation), "test": len(test)},
        "contestants": [asdict(probe), asdict(lora)],
        "margin": lora.test_accuracy - probe.test_accuracy,
        "identical_labels": labels,
        "identical_probabilities": bits,
        "adapter": str(place / "adapter"),
        "adapter_bytes": sum(f.stat().st_size for f in (place / "adapter").iterdir()),
        "seconds": time.perf_counter() - begun,
    }
    (place / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if bits != len(test):
        raise GraftError(f"the loaded adapter predicts otherwise for {len(test) - bits} of {len(test)} texts")
    return report


def linear_probe(
    train: Sequence[Any], validation: Sequence[Any], test: Sequence[Any], labels: Sequence[str], dtype: str
) -> Contestant:
    """Logistic regression on mean-pooled embeddings; its strength and the scaling are chosen on validation data."""
    from sklearn.linear_model import LogisticRegression

    start, memory = time.perf_counter(), PeakMemory(torch.device("cpu"))
    base = load_base(BASE, dtype=dtype)
    x, steps = {}, []
    for name, rows in {"train": train, "validation": validation, "test": test}.items():
        x[name] = _embed(base, [r["text"] for r in rows], steps)
    y = {k: [r["label"] for r in rows] for k, rows in [("train", train), ("validation", validation), ("test", test)]}
    best: tuple[float, Any, dict[str, Any]] | None = None
    for unit in (False, True):
        scaled = {k: torch.nn.functional.normalize(v) if unit else v for k, v in x.items()}
        for strength in (0.01, 0.1, 0.3, 1, 3, 10, 30, 100) if unit else (0.003, 0.01, 0.03, 0.1, 0.3, 1, 3):
            model = LogisticRegression(C=strength, max_iter=1000).fit(scaled["train"].numpy(), y["train"])
            score = float(model.score(scaled["validation"].numpy(), y["validation"]))
            if best is None or score > best[0]:
                accuracy = float(model.score(scaled["test"].numpy(), y["test"]))
                best = score, accuracy, {"C": strength, "unit_length": unit}
    assert best
    size = (x["train"].shape[1] + 1) * len(labels)
    return Contestant(
        "linear probe", 100 * best[1], size, sorted(steps)[len(steps) // 2], time.perf_counter() - start,
        memory.bytes(), best[2],
    )  # fmt: skip


@torch.no_grad()
def _embed(base: Any, texts: Sequence[str], steps: list[float]) -> torch.Tensor:
    """Mean-pooled embeddings [texts, width] in fp32, in batches of similar length, each timed."""
    from .bases.minilm import mean_pool

    size, limit = TRAINING["batch_size"], TRAINING["max_length"]
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    found: dict[int, torch.Tensor] = {}
    for i in range(0, len(order), size):
        start = time.perf_counter()
        rows = order[i : i + size]
        batch = base.processor(
            [texts[j] for j in rows], padding=True, truncation=True, max_length=limit, return_tensors="pt"
        )
        hidden = base.model(**batch).last_hidden_state
        found.update(zip(rows, mean_pool(hidden, batch["attention_mask"])))
        steps.append(time.perf_counter() - start)
    return torch.stack([found[i] for i in range(len(texts))])


def predict_anew(place: Path, test: Sequence[Any], dtype: str) -> list[Any]:
    """What a new process predicts with the saved adapter, by the command that a user would give."""
    texts, answers = place / "test.jsonl", place / "predictions.jsonl"
    texts.write_text("".join(json.dumps(row) + "\n" for row in test), encoding="utf-8")
    command = ["predict", BASE, "--adapter", str(place / "adapter"), "--data", str(texts), "--output", str(answers)]
    done = subprocess.run(
        [sys.executable, "-m", "graft", *command, "--dtype", dtype], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise GraftError(f"the new process failed: {done.stderr.strip()}")
    return [json.loads(line)["prediction"] for line in answers.read_text(encoding="utf-8").splitlines()]


def _predict(base: Any, rows: Sequence[Any]) -> list[Any]:
    return predict(base.model, list(rows), **base.arguments())


def _accuracy(predictions: Sequence[Any], rows: Sequence[Any]) -> float:
    return 100 * sum(p["label"] == r["label"] for p, r in zip(predictions, rows)) / len(rows)


def faster_dtype(repeats: int = 5) -> str:
    """bfloat16 or float32, whichever multiplies matrices of the encoder's size faster on this machine."""
    times = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(1024, 384, dtype=dtype), torch.randn(384, 1536, dtype=dtype)
        torch.mm(a, b)
        start = time.perf_counter()
        for _ in range(repeats):
            torch.mm(a, b)
        times[str(dtype).removeprefix("torch.")] = time.perf_counter() - start
    return min(times, key=lambda k: times[k])
