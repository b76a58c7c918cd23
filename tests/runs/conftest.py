import pytest
import torch

from models import tokenizer


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """A folder with a tiny language model, which has no biases, and a tiny encoder."""
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    root, words = tmp_path_factory.mktemp("bases"), tokenizer()
    sizes = dict(hidden_size=16, num_hidden_layers=1, intermediate_size=24, num_attention_heads=2)
    sizes |= dict(vocab_size=len(words), max_position_embeddings=64, pad_token_id=0, initializer_range=0.3)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes, bos_token_id=None, eos_token_id=2)).save_pretrained(root / "llama")
    BertModel(BertConfig(**sizes), add_pooling_layer=False).save_pretrained(root / "bert")
    for name in ("llama", "bert"):
        words.save_pretrained(root / name)
    return root
