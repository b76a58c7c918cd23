"""seedling-small: the small sister of `graft:seedling`, with the same tokenizer and the same corpus.

A Llama (Llama 2: Open Foundation and Fine-Tuned Chat Models, Touvron et al., 2023, https://arxiv.org/abs/2307.09288) of
5 layers, width 160, 5 heads with one head of keys and values, and 512 positions; input and output embeddings are one.
With seedling it makes a pair for whatever needs a large and a small model of the same tokens: proxy tuning,
distillation, speculative decoding, moving adapters from one base to another. The recipe is `bases/seedling-small.yaml`.
"""
