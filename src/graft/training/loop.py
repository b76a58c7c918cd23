"""The training loop: from a model with trainable parameters and data to trained parameters."""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..core.errors import GraftError
from . import checkpoints, optimizers, resumption
from .batches import Plan
from .clipping import clip_components
from .data import divided, held_out, read
from .evaluation import choose, half, length, measure, processor_of
from .gradient_dropout import GradientDropout
from .guards import (
    check_packing,
    check_reached,
    check_settings,
    check_trackers,
    not_finite,
    plain_attention,
    recomputing,
    training_mode,
    within_memory,
)
from .messages import nearest
from .objectives import Objective, name_classes
from .report import PeakMemory, Report
from .schedules import schedule as schedule_called
from .trial import Aside


def _loss(task: Objective, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return task.loss(model, batch)[0]


@dataclass
class Result:
    """What a run gave: the model itself carries the parameters.

    metrics         on the validation data, of the parameters that the model carries; {} without validation data
    history         one dict a step (loss, learning_rate, grad_norm, epoch, seconds) and one an evaluation (validation)
    steps           optimizer steps taken in all, with those before a resumption
    best_step       the step whose parameters the model carries
    step_seconds    median time of a step of this process, without evaluation and saving; None if there was no step
    peak_memory     bytes, of the accelerator, or of the whole process on a CPU
    labels          names of the classes, in the order of the model's outputs
    """

    metrics: dict[str, float]
    history: list[dict[str, Any]]
    steps: int
    best_step: int
    step_seconds: float | None
    peak_memory: int | None
    labels: list[str] | None


def fit(
    model: nn.Module,
    data: Any,
    *,
    objective: Any = "auto",
    processor: Any = None,
    validation: Any = None,
    columns: Mapping[str, str] | None = None,
    labels: Sequence[str] | None = None,
    max_length: int | None = None,
    packing: bool = False,
    length_grouping: bool = True,
    epochs: float = 3,
    steps: int | None = None,
    batch_size: int = 8,
    gradient_accumulation: int = 1,
    learning_rate: float = 2e-4,
    head_learning_rate: float | None = None,
    loraplus_lr_ratio: float | None = None,
    optimizer: Any = "adamw",
    optimizer_options: Mapping[str, Any] | None = None,
    weight_decay: float = 0.0,
    schedule: str = "linear",
    rate_changes: Mapping[int, float] | None = None,
    warmup: float = 0.06,
    clip: float | None = 1.0,
    clip_by: str = "global",
    gradient_dropout: float | None = None,
    precision: str = "auto",
    checkpointing: bool = False,
    seed: int = 0,
    eval_every: int | None = None,
    metric: str | None = None,
    patience: int | None = None,
    keep: str = "best",
    output: str | Path | None = None,
    save_every: int | None = None,
    resume: bool | str = "auto",
    trackers: Sequence[Any] = (),
    watch: Callable[[dict[str, Any]], Any] | None = None,
    progress: bool = True,
) -> Result:
    """Train every parameter of `model` that requires a gradient: its adapters and new heads.

    Of several adapters those are trained together which run and are not frozen, each with its schedule and its penalty;
    one that is frozen (`adapter.requires_grad_(False)`) or switched off keeps its bits.
    The model is trained in place, on the devices that `accelerate` finds (start with `accelerate launch` for several).
    With validation data it carries the best parameters seen at the end (see `keep`), otherwise the last ones.

    data                   see `graft.training.read`
    validation             data to measure on while training, or the fraction of `data` to hold out for that: 0.1
    columns                {name that is needed: name in the data}
    objective              classification, regression, causal-lm, seq2seq, image-classification, flow-matching; auto: by
                           the columns, and by the class of the model where they leave a choice; or a class derived
                           from `graft.training.objectives.Objective`
    processor              a tokenizer or image processor, or its name; by default the model's own
    labels                 names of the classes in the order of the outputs; by default the model's, or the data's.
                           They are written into the model's configuration
    max_length             tokens of one example; by default what the model takes, 1,024 at most
    packing                several examples in a row (causal-lm), which do not see each other
    length_grouping        batches of examples of similar length
    epochs, steps          how long: `steps` optimizer steps, or `epochs` passes over the data
    batch_size             examples on one device at a time; gradient_accumulation: batches in one step.
                           The loss is the mean over all terms (tokens, examples) of a step, however they are divided
    learning_rate          its peak; head_learning_rate: the peak for the adapters' `heads`
    loraplus_lr_ratio      LoRA+: how many times faster B of an update B A learns than A, 16 for example
    optimizer              a name in torch.optim or pytorch-optimizer, or a class; optimizer_options: its keywords
    weight_decay           of matrices only
    schedule               of the learning rate after warmup: linear, cosine, wsd, constant
    rate_changes           {steps taken: factor}: from then on all learning rates are this many times what they would be
    warmup                 how long the learning rate rises: steps, or below 1 a share of the run
    clip                   largest norm of the gradient; None for no limit
    clip_by                whose norm: global, that of all parameters together; component, that of each tensor alone, so
                           that none holds back the others (https://arxiv.org/abs/2210.10325)
    gradient_dropout       how much of a gradient is taken away where it is against what the base says: 1, all of it; so
                           less of that is forgotten (https://arxiv.org/abs/2307.15049). The base must know something of
                           the task: classes or tokens, no new head; each batch costs a forward of the base and a
                           backward more
    precision              bf16: compute in bfloat16 (autocast) beside fp32 parameters; fp32; auto: bf16 where a GPU
                           has it or the base is stored in it. A base stored in fp32 is cast anew at every use: load it
                           in bfloat16 for the least memory
    checkpointing          recompute activations in the backward pass instead of keeping them
    seed                   of the order of the data, of dropout and of the held-out part
    eval_every, save_every in steps; by default after each epoch
    metric                 which of the validation metrics says what is best; by default accuracy, mse or loss
    patience               stop after so many evaluations without a better `metric`
    keep                   which parameters the model carries at the end: best, of those measured on the validation data
                           by `metric`, or last, where that data is only looked at
    output                 folder of the run: checkpoints, history.jsonl, trackers' files; nothing is written without it
    resume                 "auto": go on where an earlier run in `output` stopped, to the same bits as without the stop;
                           True: refuse to begin anew; False: begin anew and remove the earlier run's checkpoints
    trackers               names known to accelerate, such as "tensorboard"
    watch                  called in the main process with each new entry of `Result.history`
    progress               show how far it is, if it takes longer than 2 seconds

    Raises `GraftError` for what cannot be done, for a loss that is not finite (the parameters are then those before the
    step, and the last checkpoint stays) and when memory runs out.
    """
    given = dict(locals())
    check_settings(given)
    settings = {k: v for k, v in given.items() if isinstance(v, int | float | str)}
    from accelerate import Accelerator
    from accelerate.utils import gather_object, set_seed

    idle = resumption.idle(model)
    trainable = [p for p in model.parameters() if p.requires_grad and p not in idle]
    if not trainable:
        raise GraftError(
            "the model has nothing to train: attach an adapter first, let parameters require gradients"
            + (", or switch an adapter on" if idle else "")
        )
    run = None if output is None else Path(output)
    if trackers and run is None:
        raise GraftError("trackers write into the folder of the run: pass output=")
    check_trackers(trackers)

    # The data as batches.
    examples, held = read(data, columns=columns), None
    if isinstance(validation, float):
        examples, held = held_out(examples, validation, seed)
    elif validation is not None:
        held = read(validation, split="validation", columns=columns)
    trained = resumption.trained_adapters(model).values()
    kept = max((adapter.aside(len(examples)) for adapter in trained), default=0)
    if kept >= len(examples):
        raise GraftError(f"of {len(examples)} training examples {kept} are kept aside for the method: more are needed")
    examples, apart = divided(examples, kept, seed) if kept else (examples, None)
    task = choose(objective, examples, model)(
        model, processor_of(model, processor), max_length=max_length, labels=labels, packing=packing
    )
    deciding = metric or next(iter(task.metrics))
    if deciding not in task.metrics:
        raise GraftError(f"{task.name} has no metric {deciding!r}: {nearest(deciding, task.metrics)}")
    features = task.features(examples)
    tested, apart = (None if some is None else task.features(some) for some in (held, apart))
    name_classes(model, task.labels)
    lengths = [length(features, i) for i in range(len(features))]
    plan = Plan(lengths, batch_size, seed=seed, grouped=length_grouping)

    # Mixed precision is torch's own autocast: accelerate's replaces the model's forward and turns all logits into fp32.
    accelerator = Accelerator(mixed_precision="no", log_with=list(trackers) or None, project_dir=run)
    device, rank, ranks = accelerator.device, accelerator.process_index, accelerator.num_processes
    bf16 = half(model, precision, device)
    per_epoch = plan.steps(gradient_accumulation, ranks)
    if gradient_dropout and (not task.classes or ranks > 1):
        raise GraftError(
            f"gradient_dropout is for one process and for objectives over classes or tokens, not for "
            f"{f'{ranks} processes' if ranks > 1 else task.name}"
        )
    total = steps or max(1, math.ceil(epochs * per_epoch))
    eval_every, save_every = eval_every or per_epoch, save_every or per_epoch
    changes = sorted((int(at), float(times)) for at, times in (rate_changes or {}).items())
    factor, warm = schedule_called(schedule), min(warmup if warmup < 1 else warmup / total, 0.999)
    for adapter in trained:
        adapter.task = task.task(model)
    heads = [p for a in trained for path, _ in a.heads for p in a.deltas[path].parameters()]
    tuner: Any = optimizers.build(
        optimizer, trainable, learning_rate=learning_rate, weight_decay=weight_decay,
        heads=heads, head_learning_rate=head_learning_rate, ups=[p for a in trained for p in a.ups()],
        loraplus_lr_ratio=loraplus_lr_ratio, options=optimizer_options,
    )  # fmt: skip

    dropping = GradientDropout(model, trainable, gradient_dropout) if gradient_dropout else None

    def total_of(value: Any) -> Any:
        return accelerator.reduce(torch.as_tensor(value, device=device)) if ranks > 1 else value

    def summed(module: Any, batch: dict[str, torch.Tensor], loss: Callable = _loss) -> torch.Tensor:
        batch = {k: v.to(device) for k, v in batch.items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            return loss(task, module, batch)

    def worth(scores: dict[str, float]) -> tuple[float, ...]:
        """More is better; where the metric does not decide, the loss does."""
        signed = scores[deciding] if task.metrics[deciding] else -scores[deciding], -scores["loss"]
        return tuple(-math.inf if math.isnan(v) else v for v in signed)

    report = None
    try:
        for p in idle:
            p.requires_grad_(False)
        wrapped, tuner = accelerator.prepare(model, tuner)
        if packing:
            check_packing(model, task, features, device, bf16)
        if trackers:
            accelerator.init_trackers("graft", config=settings)

        # The state of the run: new, or that of an earlier one.
        set_seed(seed, device_specific=True)
        step, waiting, stopped, history = 0, 0, False, []
        best: dict[str, Any] | None = None
        seen = chain(features, apart or ()), tested
        identity = resumption.identity(settings, changes, optimizer_options or {}, task.name, seen, model, ranks)
        if run and (saved := resumption.earlier(run, resume, identity, accelerator.is_main_process)):
            step, best, waiting, stopped = (saved[k] for k in ("step", "best", "waiting", "stopped"))
            history = resumption.history(run, saved["records"])
            resumption.set_tensors(model, saved["tensors"])
            optimizers.restore(tuner.optimizer, saved["optimizer"])
            checkpoints.set_random_state(saved["random"][rank], device)
        report = Report(accelerator, total, output=run, progress=progress, history=history, watch=watch)
        memory, seconds = PeakMemory(device), []
        aside = None
        if apart is not None:
            apart_plan = Plan([length(apart, i) for i in range(len(apart))], batch_size, seed=seed)
            stream = apart_plan.stream(step, gradient_accumulation, rank, ranks)
            aside = Aside(accelerator, model, task, apart, apart_plan, stream, lambda batch: summed(model, batch))

        plain = plain_attention(model, device, bf16 and not packing, max(lengths))
        with recomputing(model, checkpointing), training_mode(model), within_memory(device, batch_size), plain:
            batches = plan.stream(step, gradient_accumulation, rank, ranks)
            for picked in islice(batches, 0 if stopped else total - step):
                begun = time.perf_counter()
                micros = [task.collate([features[i] for i in rows]) for rows in picked]
                terms = int(total_of(sum(task.terms(batch) for batch in micros)))
                losses, measured = [], partial(dropping.loss, terms=terms) if dropping else _loss
                for number, batch in enumerate(micros, 1):
                    with nullcontext() if number == len(micros) else accelerator.no_sync(wrapped):
                        loss = summed(wrapped, batch, measured) / terms
                        if not loss.requires_grad:
                            raise GraftError(
                                "the loss depends on nothing that is trained: graft.verify(model, batch) tells what a "
                                "forward reaches"
                            )
                        losses.append(loss.detach())
                        penalty = sum(p for a in trained if (p := a.penalty()) is not None) / len(micros)
                        # Processes average their gradients, and each has only its part of the sum.
                        accelerator.backward(loss * ranks + penalty)
                if not seconds:
                    check_reached(trained)
                if dropping:
                    dropping.apply()
                norm: Any = accelerator.clip_grad_norm_(trainable, clip if clip and clip_by == "global" else math.inf)
                loss, norm = float(total_of(torch.stack(losses).sum())), float(norm)
                if not (math.isfinite(loss) and math.isfinite(norm)):
                    raise not_finite(loss, norm, step + 1, picked, losses, step // per_epoch + 1)
                if clip and clip_by == "component":
                    clip_components(trainable, clip)
                rate = factor((step + 0.5) / total, warm) * next((f for at, f in reversed(changes) if at <= step), 1.0)
                trial = None if aside is None else aside.trial(micros, rate * learning_rate)
                for adapter in trained:
                    if trial is not None:
                        optimizers.forget(tuner.optimizer, adapter.review((step + 1) / total, trial))
                    optimizers.forget(tuner.optimizer, adapter.step((step + 1) / total))
                for group in tuner.param_groups:
                    group["lr"] = group["peak"] * rate
                tuner.step()
                tuner.zero_grad(set_to_none=True)
                step += 1
                seconds.append(time.perf_counter() - begun)
                report.add({
                    "step": step, "epoch": round(step / per_epoch, 6), "loss": loss, "grad_norm": norm,
                    "learning_rate": tuner.param_groups[0]["lr"], "seconds": round(seconds[-1], 6),
                })  # fmt: skip

                if tested is not None and (step % eval_every == 0 or step == total):
                    with optimizers.averaged(tuner.optimizer):
                        scores = measure(model, task, tested, batch_size, device, bf16, rank, ranks)
                        value, waiting = worth(scores), waiting + 1
                        if best is None or value > best["value"]:
                            copy = resumption.tensors(model) if keep == "best" else None
                            best, waiting = {"value": value, "step": step, "metrics": scores, "tensors": copy}, 0
                    report.add({"step": step, "validation": scores})
                    stopped = patience is not None and waiting >= patience
                if run and (step % save_every == 0 or step == total or stopped):
                    states = gather_object([checkpoints.random_state(device)])
                    if accelerator.is_main_process:
                        checkpoints.save(run, step, {
                            "identity": identity, "step": step, "best": best, "waiting": waiting, "stopped": stopped,
                            "records": report.flush(), "random": states, "tensors": resumption.tensors(model),
                            "optimizer": tuner.optimizer.state_dict(),
                        })  # fmt: skip
                if stopped:
                    break
        optimizers.average(tuner.optimizer)
        if best and keep == "best":
            resumption.set_tensors(model, best["tensors"])
        elif best:
            best |= {"step": step, "metrics": next(r["validation"] for r in reversed(history) if "validation" in r)}
        return Result(
            metrics=best["metrics"] if best else {},
            history=history, steps=step, best_step=best["step"] if best else step,
            step_seconds=statistics.median(seconds) if seconds else None, peak_memory=memory.bytes(),
            labels=list(task.labels) if task.labels else None,
        )  # fmt: skip
    finally:
        for p in idle:
            p.requires_grad_(True)
        tuner.zero_grad(set_to_none=True)
        model.__dict__.pop("_is_accelerate_prepared", None)
        if report:
            report.close()
