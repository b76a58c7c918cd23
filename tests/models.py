"""Tiny models with random weights, for tests."""

import torch
from torch import nn

WORDS = "good bad film book great awful plot the a was is very not story lovely dull fine poor"


def llama(dtype=torch.float32, layers=2, seed=0, **config):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = dict(
        hidden_size=32,
        num_hidden_layers=layers,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
        max_position_embeddings=128,
    )
    return LlamaForCausalLM(LlamaConfig(**(sizes | config))).to(dtype).eval()


def gpt2(seed=0, **config):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    sizes = dict(n_embd=32, n_layer=2, n_head=2, vocab_size=50, n_positions=64)
    return GPT2LMHeadModel(GPT2Config(**(sizes | config))).eval()


def bert(labels=3, seed=0, **config):
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    sizes = dict(
        hidden_size=32,
        num_hidden_layers=2,
        intermediate_size=48,
        num_attention_heads=4,
        vocab_size=50,
        num_labels=labels,
        max_position_embeddings=64,
    )
    return BertForSequenceClassification(BertConfig(**(sizes | config))).eval()


def tokenizer():
    """Byte pairs of `WORDS`, with <pad>, <unk> and </s>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=160, special_tokens=["<pad>", "<unk>", "</s>"], show_progress=False)
    made.train_from_iterator([WORDS], trainer)
    special = dict(pad_token="<pad>", unk_token="<unk>", eos_token="</s>")
    return PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=64, **special)


def tokens(rows=3, length=9, vocabulary=50, seed=0):
    return torch.randint(0, vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))


def move(adapter, by=0.2, seed=1):
    """Take an adapter away from its start, where it computes nothing."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(by * torch.randn_like(p))
    return adapter


def attach(model, method, name, seed=1, targets=None, **hyper):
    """An adapter of any method with its small hyperparameters, away from its start."""
    import graft
    from graft import methods

    methods.load()
    cls = graft.METHODS[method]
    hyper, stats = cls.small | hyper, None
    targets = targets or ("lm_head" if method == "full" else None)
    if needs := cls.asks(cls(**hyper).hyper):
        loss = lambda model, batch: model(batch).logits.square().mean()
        stats = graft.collect(graft.core.host.bare_copy(model), [tokens()], needs, targets or cls.targets, loss=loss)
    return move(graft.attach(model, cls(**hyper), targets, name=name, stats=stats), seed=seed)


def damage(file, data):
    """Cut a file short, or change some of its bytes, as hypothesis draws."""
    from hypothesis import strategies as st

    content = bytearray(file.read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
            content[place] = data.draw(st.integers(0, 255))
    file.write_bytes(bytes(content))


def picture(model: nn.Module):
    """Everything of a model that a stranger could see: classes, attributes, flags, bits."""
    return [
        (
            path,
            type(m),
            sorted(m.__dict__.keys() - {"_kept"}),  # but what a delta has prepared
            sorted(m._modules),
            m.training,
            [(n, id(p), p.requires_grad, p.detach().cpu().view(torch.uint8).numpy().tobytes() if p.numel() else b"")
             for n, p in m.named_parameters(recurse=False)],
        )
        for path, m in model.named_modules()
    ]  # fmt: skip
