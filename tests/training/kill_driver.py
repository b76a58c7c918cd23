"""Runs of one small training which are killed with SIGKILL, at random moments and at each step of a save.

Prints what became of them as JSON. The runs are forks of this process, so that the libraries load only once; nothing is
computed here before a fork, since torch's threads for gradients do not survive one.
"""

import hashlib
import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import accelerate
import safetensors.torch
import small
import torch

import graft
import models
from graft.training import fit
from graft.training.objectives import find

torch.set_num_threads(1)
accelerate.Accelerator()  # loads what a run needs, once for all forks
graft.attach(models.llama(), graft.LoRA())
find("causal-lm")
POINTS = [(os, "mkdir"), (safetensors.torch, "save_file"), (os, "fsync"), (os, "rename"), (os, "unlink"), (os, "rmdir")]


def train(folder):
    model = models.llama(attention_dropout=0.2)
    adapter = graft.attach(model, graft.LoRA(rank=2, dropout=0.1))
    result = fit(
        model, small.rows(20),
        processor=small.Tokenizer(), validation=0.2, eval_every=3, save_every=1, epochs=2, batch_size=2,
        gradient_accumulation=2, learning_rate=1e-2, output=folder, progress=False,
    )  # fmt: skip
    digest = hashlib.sha256()
    for tensor in adapter.state_dict().values():
        digest.update(tensor.numpy().tobytes())
    history = [{k: v for k, v in r.items() if k != "seconds"} for r in result.history]
    on_disk = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    assert on_disk == result.history
    return {"bits": digest.hexdigest(), "history": history, "metrics": result.metrics, "steps": result.steps}


def die_at(call):
    """Kill this process right before its `call`-th touch of the disk that belongs to a save; count them in the end."""
    done = [0]

    def watched(function):
        def wrapper(*args, **kwargs):
            done[0] += 1
            if done[0] == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return wrapper

    for module, name in POINTS:
        setattr(module, name, watched(getattr(module, name)))
    return done


def fork(folder, call=0, after=None):
    """Train in a child; its result, or None if it was killed (by itself, or by us `after` so many seconds)."""
    answer = folder.parent / "answer.json"
    answer.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            touched = die_at(call)
            result = train(folder)
            answer.write_text(json.dumps({**result, "touched": touched[0]}))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return None
    assert os.WEXITSTATUS(status) == 0, "a run failed"
    return json.loads(answer.read_text())


def main(root):
    begun = time.monotonic()
    reference = fork(root / "reference")
    lasts = time.monotonic() - begun
    outcomes = []
    per_save = reference["touched"] // reference["steps"]
    for call in range(3 * per_save, 4 * per_save + 1):  # every touch of the disk in a save that removes an older one
        folder = root / f"at-{call}"
        killed = fork(folder, call) is None
        outcomes.append({"at": f"touch {call}", "kills": int(killed), "result": fork(folder)})
    draw = random.Random(int(time.time()))
    for number in range(2):
        folder, kills, result = root / f"random-{number}", 0, None
        while result is None and kills < 6:
            kills, result = kills + 1, fork(folder, after=draw.uniform(0.05, lasts * 0.8))
        outcomes.append({"at": "random moments", "kills": kills, "result": result or fork(folder)})
    print(json.dumps({"reference": reference, "outcomes": outcomes}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
