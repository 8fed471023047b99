"""Small models of the kinds that people train, in float64 and evaluation mode, with a batch for them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

VOCABULARY = 23


def gpt2(**settings: Any) -> GPT2LMHeadModel:
    sizes = {"vocab_size": VOCABULARY, "n_positions": 12, "n_embd": 8, "n_layer": 2, "n_head": 2}
    return ready(GPT2LMHeadModel(GPT2Config(**{**sizes, "bos_token_id": 0, "eos_token_id": 0, **settings})))


def llama(**settings: Any) -> LlamaForCausalLM:
    """Grouped queries; embedding and head tied unless told otherwise."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    return ready(LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, **settings})))


BERT = {"vocab_size": VOCABULARY, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}


def bert(**settings: Any) -> BertForMaskedLM:
    """The decoder is tied to the embedding and has a bias of its own."""
    return ready(
        BertForMaskedLM(BertConfig(**{**BERT, "num_attention_heads": 2, "max_position_embeddings": 12, **settings}))
    )


def bert_classifier(labels: int = 3) -> BertForSequenceClassification:
    config = BertConfig(**BERT, num_attention_heads=2, max_position_embeddings=12, num_labels=labels)
    return ready(BertForSequenceClassification(config))


def t5() -> T5ForConditionalGeneration:
    sizes = {"vocab_size": VOCABULARY, "d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 1, "num_heads": 2}
    return ready(T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0)))


def ready(model: nn.Module) -> Any:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + 0.05)
    return model.double().eval()


def text(n: int = 3, t: int = 7, padding: bool = True) -> dict[str, Tensor]:
    """Token sequences of unequal length, padded on the right; the first two labels of each are masked."""
    generator = torch.Generator().manual_seed(n)
    tokens = torch.randint(1, VOCABULARY, (n, t), generator=generator)
    mask = (torch.arange(t) < t - torch.arange(n)[:, None] % 3 * int(padding)).long()
    labels = tokens.masked_fill(mask == 0, -100)
    labels[:, :2] = -100
    return {"input_ids": tokens * mask, "attention_mask": mask, "labels": labels}


def take(batch: dict[str, Tensor], rows: list[int]) -> dict[str, Tensor]:
    return {key: value[rows] for key, value in batch.items()}


def causal_losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Cross-entropy of each sequence, written out."""
    output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    return token_losses(output.logits[:, :-1], batch["labels"][:, 1:])


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    chosen = logits.log_softmax(-1).gather(2, labels.clamp_min(0)[:, :, None])[:, :, 0]
    return -(chosen * (labels != -100)).sum(1)


class Mlp(nn.Module):
    """(x, y) classification."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(*(layers or (nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4))))
        self.double()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layers(inputs)


def points(n: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    labels = torch.randint(4, (n,), generator=generator)
    return torch.randn(n, 3, generator=generator, dtype=torch.float64), labels


def class_losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


class Laid(nn.Module):
    """Works on tokens [n, t, 3] in a layout of its own."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        self.layout = layout
        self.inner, self.after, self.head = nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        n, t, d = inputs.shape
        if self.layout == "flat":
            hidden = self.after(self.inner(inputs.reshape(n * t, d)).tanh()).reshape(n, t, d)
        else:
            hidden = self.after(self.inner(inputs.transpose(0, 1)).tanh()).transpose(0, 1)
        return self.head(hidden.mean(1))


def sequences(n: int, t: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    inputs = torch.randn(n, t, 3, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(4, (n,), generator=generator)
