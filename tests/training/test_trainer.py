import torch

import graft
import models
from graft.training import fit
from graft.training.objectives import find


def test_the_trainer_of_transformers_trains_an_adapted_model_to_the_same_parameters(tokenizer, sentences, tmp_path):
    from transformers import Trainer, TrainingArguments

    examples = [{"prompt": a, "completion": " " + b} for a, b in zip(sentences(6), sentences(6, seed=1))]

    def adapted():
        model = models.llama()
        base = {n: p.detach().clone() for n, p in model.named_parameters()}
        return model, graft.attach(model, graft.LoRA(rank=2)), base

    model, adapter, base = adapted()
    task = find("causal-lm")(model, tokenizer)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=6, max_steps=5, learning_rate=1e-2,
        lr_scheduler_type="constant", max_grad_norm=1.0, report_to=[], save_strategy="no", use_cpu=True,
        disable_tqdm=True, optim="adamw_torch",
    )  # fmt: skip
    start = [p.detach().clone() for p in adapter.parameters()]
    trainer = Trainer(model=model, args=arguments, train_dataset=task.features(examples), data_collator=task.collate)
    loss = trainer.train().training_loss

    other, ours, _ = adapted()
    result = fit(other, examples, processor=tokenizer, batch_size=6, steps=5, learning_rate=1e-2, schedule="constant",
                 warmup=0.0, progress=False)  # fmt: skip
    assert abs(loss - sum(r["loss"] for r in result.history) / 5) < 1e-4
    for a, b, before in zip(adapter.parameters(), ours.parameters(), start):
        assert not torch.equal(a, before) and torch.allclose(a, b, atol=1e-4)
    assert all(torch.equal(dict(model.named_parameters())[n], p) for n, p in base.items())
