"""What the recipes of the image models share: the digits, their augmentation, and a loop that survives a kill."""

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ViTImageProcessor

from graft import tasks
from graft.training import checkpoints

Loss = Callable[[nn.Module, torch.Generator], Tensor]


def digits(split: str) -> tuple[Tensor, Tensor]:
    """The images of a split of the task `digits`, seed 0, [n, 1, 8, 8] from -1 to 1, and their digits [n]."""
    rows = tasks.load("digits", split=split)
    images = torch.tensor(np.stack([row["image"][..., 0] for row in rows]))
    return images[:, None] / 127.5 - 1, torch.tensor([int(row["label"]) for row in rows])


def processor() -> Any:
    """Grey images of any size as 8 x 8 pixels from -1 to 1."""
    return ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.5])


def some(images: Tensor, count: int, draw: torch.Generator) -> Tensor:
    """`count` positions of images; no image twice before all came."""
    return torch.cat([torch.randperm(len(images), generator=draw) for _ in range(-(-count // len(images)))])[:count]


def drawn(count: int, low: float, high: float, draw: torch.Generator) -> Tensor:
    """`count` numbers, evenly spread between two."""
    return low + (high - low) * torch.rand(count, generator=draw)


def warped(
    images: Tensor,
    draw: torch.Generator,
    *,
    degrees: float = 0.0,
    shear: float = 0.0,
    scale: float = 0.0,
    shift: float = 0.0,
    elastic: float = 0.0,
) -> Tensor:
    """Images [n, 1, 8, 8] bent at random, each otherwise; what comes from outside is black.

    Each limit is one of an even distribution: rotation up to `degrees` either way, `shear` as the tangent, `scale` as
    the share by which height and width change, `shift` in pixels. `elastic` is the standard deviation, in pixels, of
    the displacement of 3 x 3 points between which it is interpolated.
    """
    n, size = len(images), images.shape[-1]
    angle = torch.deg2rad(drawn(n, -degrees, degrees, draw))
    wide, high = (drawn(n, 1 - scale, 1 + scale, draw) for _ in range(2))
    slant = drawn(n, -shear, shear, draw)
    rows = [[angle.cos() * wide, (slant - angle.sin()) * high], [angle.sin() * wide, angle.cos() * high]]
    moved = torch.stack([drawn(n, -shift, shift, draw) * 2 / size for _ in range(2)], -1)
    turn = torch.cat([torch.stack([torch.stack(row, -1) for row in rows], 1), moved[..., None]], -1)
    grid = F.affine_grid(turn, [n, 1, size, size], align_corners=False)
    bends = torch.randn(n, 2, 3, 3, generator=draw) * elastic * 2 / size
    grid = grid + F.interpolate(bends, size=(size, size), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    return F.grid_sample(images + 1, grid, align_corners=False) - 1


def recoloured(images: Tensor, draw: torch.Generator, *, contrast: float = 0.0, noise: float = 0.0) -> Tensor:
    """Images with a brightness of white between 1 - `contrast` and 1, and normal noise of at most that deviation."""
    n = len(images)
    strength = drawn(n, 1 - contrast, 1, draw)[:, None, None, None]
    spread = drawn(n, 0, noise, draw)[:, None, None, None]
    return ((images + 1) * strength - 1 + spread * torch.randn(images.shape, generator=draw)).clamp(-1, 1)


def train(
    model: nn.Module,
    loss: Loss,
    held_out: Callable[[nn.Module], float],
    *,
    steps: int,
    until: int | None = None,
    folder: Path,
    learning_rate: float,
    weight_decay: float = 0.05,
    warmup: int = 200,
    average: float = 0.999,
    seed: int = 0,
    every: int = 250,
    device: str = "cpu",
) -> list[dict[str, float]]:
    """Train `model` with AdamW and a cosine schedule; it carries the moving average of its weights at the end.

    loss      of one step, whose draws come from a generator that the seed and the number of the step decide alone
    held_out  the loss, on other images, of the averaged weights
    until     stop after this step of the schedule, for now: a later call goes on from there
    average   what the moving average keeps of itself in one step, once it is that old
    every     steps between two records of `folder`/log.jsonl, which are returned, and two checkpoints in `folder`

    A run that was stopped goes on from its last checkpoint, to the same bits.
    """
    model.to(device)
    averaged = [p.detach().clone() for p in model.parameters()]
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, learning_rate, betas=(0.9, 0.99))
    done, last, records, begun = 0, until or steps, [], time.perf_counter()
    if found := checkpoints.newest(folder):
        done, state = found
        records, begun = state["records"], begun - state["records"][-1]["seconds"]
        for p, value, mean, known in zip(model.parameters(), state["weights"], averaged, state["averaged"]):
            p.data.copy_(value)
            mean.copy_(known)
        known = optimizer.state_dict()
        optimizer.load_state_dict(known | {"state": state["optimizer"]})
    sums: list[Tensor] = []
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("training", total=last, completed=done)
        for step in range(done + 1, last + 1):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * min(step / warmup, 0.5 * (1 + np.cos(np.pi * step / steps)))
            model.train()
            draw = torch.Generator().manual_seed(seed * 2**32 + step)
            value = loss(model, draw)
            value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            keep = min(average, (1 + step) / (10 + step))
            torch._foreach_lerp_(averaged, list(model.parameters()), 1 - keep)
            sums.append(value.detach())
            if step % every == 0 or step == last:
                weights = [p.detach().clone() for p in model.parameters()]
                _carry(model, averaged)
                model.eval()
                with torch.no_grad():
                    held = held_out(model)
                _carry(model, weights)
                seconds = round(time.perf_counter() - begun, 1)
                mean = float(torch.stack(sums).mean())
                records.append({"step": step, "loss": mean, "held_out": held, "seconds": seconds})
                sums.clear()
                state = {"weights": weights, "averaged": averaged, "optimizer": optimizer.state_dict()["state"]}
                checkpoints.save(folder, step, state | {"records": records})
                _write(folder / "log.jsonl", records)
                progress.update(bar, description=f"loss {mean:.4f}, held out {held:.4f}")
            progress.update(bar, completed=step)
    _carry(model, averaged)
    model.eval().cpu()
    return records


def _carry(model: nn.Module, values: Sequence[Tensor]) -> None:
    for p, value in zip(model.parameters(), values):
        p.data.copy_(value)


def _write(path: Path, records: list[dict[str, Any]]) -> None:
    aside = path.with_name(f".{path.name}")
    aside.write_text("".join(json.dumps(record) + "\n" for record in records))
    os.replace(aside, path)


def curve(records: Sequence[dict[str, float]]) -> list[list[float]]:
    """The records as a card has them: [step, loss, held-out loss]."""
    return [[record["step"], round(record["loss"], 5), round(record["held_out"], 5)] for record in records]


def arguments(description: str, steps: int) -> argparse.ArgumentParser:
    """The options of a recipe."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--output", type=Path, required=True, help="folder of the run; a run in it goes on")
    parser.add_argument("--steps", type=int, default=steps, help="of the optimizer (default: %(default)s)")
    parser.add_argument("--until", type=int, help="stop after this step; the same command goes on from there")
    parser.add_argument("--seed", type=int, default=0, help="of weights and draws (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--publish", action="store_true", help="write the base into src/graft/bases at the end")
    return parser


def plan(options: argparse.Namespace) -> dict[str, Any]:
    """What a recipe's `train` takes of its options."""
    return {name: getattr(options, name) for name in ("steps", "until", "seed", "device")}


def facts(records: Sequence[dict[str, float]], options: argparse.Namespace) -> dict[str, Any]:
    """How a run was made, as a card has it."""
    done = int(records[-1]["step"])
    return {
        "optimizer": "AdamW, cosine schedule, moving average of the weights",
        "steps": done if done == options.steps else f"the first {done:,} of a schedule of {options.steps:,}",
        "seed": options.seed,
        "seconds": records[-1]["seconds"],
        "device": options.device,
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
    }


def source(what: str) -> dict[str, str]:
    """Where the images are from, as a card has it."""
    return {"what": what, "licence": tasks.find("digits").licence, "source": tasks.find("digits").sources}


def show(measured: dict[str, dict[str, float]]) -> None:
    """The figures as a table on the screen."""
    for figure, by in measured.items():
        print(f"{figure:40}", *(f"{name} {value:.4f}" for name, value in by.items()), sep="  ")
