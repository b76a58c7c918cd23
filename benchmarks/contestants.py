"""Who takes part: {row of the table: how each side builds it}, with equal hyperparameters on equal modules."""

import importlib.util

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# row: (method, targets, hyperparameters)
GRAFT = {
    "lora": ("lora", LINEAR, dict(rank=8)),
    "lora, dropout": ("lora", LINEAR, dict(rank=8, dropout=0.1)),
    "dora": ("dora", LINEAR, dict(rank=8)),
    "vera": ("vera", LINEAR, dict(rank=256)),
    "loha": ("loha", LINEAR, dict(rank=8)),
    "lokr": ("lokr", LINEAR, dict(rank=8)),
    "adalora": ("adalora", LINEAR, dict(rank=12, target_rank=8)),
    "oft": ("oft", LINEAR, dict(block=32)),
    "hra": ("hra", LINEAR, dict(rank=8)),
    "bone": ("bone", LINEAR, dict(block=32)),
    "miss": ("miss", LINEAR, dict(rank=32)),
    "shira": ("shira", LINEAR, dict(density=0.01)),
    "ia3": ("ia3", ["k_proj", "v_proj", "down_proj"], {}),
    "ssf": ("ssf", LINEAR, {}),
    "ln_tuning": ("ln_tuning", "norms", {}),
    "houlsby": ("houlsby", None, dict(size=64)),
    "pfeiffer": ("pfeiffer", None, dict(size=64)),
    "parallel_adapter": ("parallel_adapter", None, dict(size=64)),
    "adaptformer": ("adaptformer", None, dict(size=64)),
    "loreft": ("loreft", None, dict(rank=4)),
    "prompt_tuning": ("prompt_tuning", None, dict(length=20)),
    "prefix_tuning": ("prefix_tuning", None, dict(length=20)),
    "llama_adapter": ("llama_adapter", None, dict(length=10, layers=4)),
}


def _peft(kind, **config):
    def build(model):
        import peft

        config.setdefault("target_modules", LINEAR) if kind not in _MODEL_LEVEL else None
        return peft.get_peft_model(model, getattr(peft, kind)(task_type="CAUSAL_LM", **config)).train()

    return build


_MODEL_LEVEL = ("PromptTuningConfig", "PrefixTuningConfig", "AdaptionPromptConfig")

PEFT = {
    "lora": _peft("LoraConfig", r=8, lora_alpha=16),
    "lora, dropout": _peft("LoraConfig", r=8, lora_alpha=16, lora_dropout=0.1),
    "dora": _peft("LoraConfig", r=8, lora_alpha=16, use_dora=True),
    "vera": _peft("VeraConfig", r=256),
    "loha": _peft("LoHaConfig", r=8, alpha=16),
    "lokr": _peft("LoKrConfig", r=8, alpha=16),
    "adalora": _peft("AdaLoraConfig", init_r=12, target_r=8, lora_alpha=16, total_step=1000),
    "oft": _peft("OFTConfig", r=0, oft_block_size=32),
    "hra": _peft("HRAConfig", r=8),
    "bone": _peft("MissConfig", r=32, init_weights="bat"),
    "miss": _peft("MissConfig", r=32),
    "shira": _peft("ShiraConfig", r=4),
    "ia3": _peft("IA3Config", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "ln_tuning": _peft("LNTuningConfig", target_modules=["input_layernorm", "post_attention_layernorm", "norm"]),
    "prompt_tuning": _peft("PromptTuningConfig", num_virtual_tokens=20),
    "prefix_tuning": _peft("PrefixTuningConfig", num_virtual_tokens=20),
    "llama_adapter": _peft("AdaptionPromptConfig", adapter_len=10, adapter_layers=4),
}


def _adapters(config):
    def build(model):
        import adapters

        adapters.init(model)
        model.add_adapter("one", config=config)
        model.train_adapter("one")
        model.set_active_adapters("one")
        return model

    return build


ADAPTERS = {}
if importlib.util.find_spec("adapters"):  # it pins an old transformers: an environment of its own
    ADAPTERS = {
        "houlsby": _adapters("double_seq_bn[reduction_factor=8]"),
        "pfeiffer": _adapters("seq_bn[reduction_factor=8]"),
        "parallel_adapter": _adapters("par_bn[reduction_factor=8]"),
        "loreft": _adapters("loreft[r=4]"),
        "prefix_tuning": _adapters("prefix_tuning_flat[prefix_length=20]"),
    }
