"""One small training, to be started by torchrun: with as many processes as there are, on the same data in each step."""

import os
import sys

import small

import graft
import models
from graft.training import fit

rows = small.rows(16)
model = models.llama()
graft.attach(model, graft.LoRA(rank=2))
fit(
    model, rows, processor=small.Tokenizer(), validation=rows[:5], steps=6, batch_size=2,
    optimizer="sgd", learning_rate=1.0, output=sys.argv[1], progress=False,
    gradient_accumulation=4 // int(os.environ["WORLD_SIZE"]),
)  # fmt: skip
