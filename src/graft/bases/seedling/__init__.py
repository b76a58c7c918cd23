"""seedling: a small causal language model, pre-trained on the documentation and the code of Python packages.

A Llama (Llama 2: Open Foundation and Fine-Tuned Chat Models, Touvron et al., 2023, https://arxiv.org/abs/2307.09288) of
6 layers, width 384, 6 heads with 2 heads of keys and values, and 512 positions; input and output embeddings are one.
Its tokenizer is byte-level BPE of 4,096 tokens; `<|endoftext|>` ends a text.

It continues docstrings and code, copies and looks things up in what it has just read; it follows no instructions. The
corpus holds nothing of the modules that the tasks of Graft are made of. The recipe is `bases/seedling.yaml`.
"""
