"""Whole models as people train them: language models, adapters, checkpointing, compilation."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from lightning_influence.capture import GradientCapture, find_components
from lightning_influence.capture.record import FactoredRecord, IndexedRecord, SumRecord
from lightning_influence.errors import UnsupportedLayerError
from tests.capture import models
from tests.capture.comparison import assert_same, gradients, one_text, truth
from tests.capture.models import Mlp, causal_losses, class_losses, points, take, text


def masked_losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return models.token_losses(logits, batch["labels"])


LANGUAGE_MODELS = {
    "gpt2": (models.gpt2, causal_losses),
    "gpt2-eager": (lambda: models.gpt2(attn_implementation="eager"), causal_losses),
    "gpt2-untied": (lambda: models.gpt2(tie_word_embeddings=False), causal_losses),
    "llama": (models.llama, causal_losses),
    "llama-eager": (lambda: models.llama(attn_implementation="eager"), causal_losses),
    "llama-untied": (lambda: models.llama(tie_word_embeddings=False), causal_losses),
    "bert": (models.bert, masked_losses),
    "bert-untied": (lambda: models.bert(tie_word_embeddings=False), masked_losses),
}


@pytest.mark.parametrize("n", [1, 3, 7])  # 7 = t
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_language_models(name: str, n: int) -> None:
    build, losses = LANGUAGE_MODELS[name]
    model, batch = build(), text(n)
    assert_same(gradients(model, batch, losses), truth(model, batch, losses, one_text, n), 1e-9)


def test_sequence_classification() -> None:
    model, labels = models.bert_classifier(), torch.tensor([0, 2, 1])

    def losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return F.cross_entropy(logits, batch["y"], reduction="none")

    batch = {**text(), "y": labels}
    assert_same(gradients(model, batch, losses), truth(model, batch, losses, one_text, 3), 1e-9)


def seq2seq_losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    logits = model(
        batch["input_ids"], attention_mask=batch["attention_mask"], decoder_input_ids=batch["input_ids"]
    ).logits
    return models.token_losses(logits, batch["labels"])


def test_encoder_decoder_but_for_its_relative_positions() -> None:
    """T5 looks them up once for all examples, [t, t], in a shape that leaves no room for examples."""
    model = models.t5()
    with pytest.raises(UnsupportedLayerError, match="relative_attention_bias: an output has shape"):
        gradients(model, text(), seq2seq_losses)
    names = {name for name, _ in model.named_parameters() if "relative_attention_bias" not in name}
    found = gradients(model, text(), seq2seq_losses, lambda name, module: "relative_attention_bias" not in name)
    assert_same(found, truth(model, text(), seq2seq_losses, one_text, 3, names), 1e-9)


# Tied weights


@pytest.mark.parametrize(
    ("build", "names"),
    [
        (models.gpt2, {"transformer.wte": ("transformer.wte", "lm_head")}),
        (models.llama, {"model.embed_tokens": ("model.embed_tokens", "lm_head")}),
        (
            models.bert,
            {
                "bert.embeddings.word_embeddings": ("bert.embeddings.word_embeddings", "cls.predictions.decoder"),
                "cls.predictions": ("cls.predictions", "cls.predictions.decoder"),
            },
        ),
    ],
    ids=["gpt2", "llama", "bert"],
)
def test_tied_parameters_are_one_component(build: Callable[[], nn.Module], names: dict[str, tuple[str, ...]]) -> None:
    shared = {c.name: tuple(u.module for u in c.uses) for c in find_components(build()) if len(c.uses) > 1}
    assert shared == names


def test_a_tied_embedding_is_never_materialised_for_products() -> None:
    model = models.gpt2(vocab_size=300, n_embd=4, n_layer=1)
    with GradientCapture(model, "wte") as capture:
        [record] = capture.record(text(), causal_losses)
    assert isinstance(record, SumRecord)
    assert {type(part) for part in record.parts} == {IndexedRecord, FactoredRecord}
    values = record.example_gradients()
    given = torch.randn(2, 300, 4, dtype=torch.float64)
    torch.testing.assert_close(record.contract(given), torch.einsum("qvd,nvd->qn", given, values))
    torch.testing.assert_close(record.squared_norms(), values.square().sum((1, 2)))
    torch.testing.assert_close(record.dot_products(record), torch.einsum("mvd,nvd->mn", values, values))


# Activation checkpointing, compilation


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_gradient_checkpointing_of_transformers_is_skipped() -> None:
    model = models.llama()
    expected = gradients(model, text(), causal_losses)
    for reentrant in (False, True):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        assert_same(gradients(model.train(), text(), causal_losses), expected)


@pytest.mark.parametrize("components", [None, "all-linear", "lm_head"])
def test_checkpoints_that_are_active_in_evaluation_mode(components: str | None) -> None:
    model = models.llama(tie_word_embeddings=False)
    model.requires_grad_(components is None)  # a frozen model gets its graph from our hooks, also when recomputed
    expected = gradients(model, text(), causal_losses, components)
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, LlamaDecoderLayer))
    found = gradients(model, text(), causal_losses, components)
    assert_same({name.replace("_checkpoint_wrapped_module.", ""): value for name, value in found.items()}, expected)


@pytest.mark.parametrize("how", ["wrapped", "in place", "a child"])
def test_compiled_and_warm(how: str) -> None:
    torch._dynamo.reset()
    model, compiled = Mlp(), Mlp()
    if how == "wrapped":
        compiled = torch.compile(compiled, backend="aot_eager")
    elif how == "in place":
        compiled.compile(backend="aot_eager")
    else:
        compiled.layers = torch.compile(compiled.layers, backend="aot_eager")
    class_losses(compiled, points()).sum().backward()
    found = gradients(compiled, points(), class_losses)
    expected = gradients(model, points(), class_losses)
    assert_same({name.replace("_orig_mod.", ""): value for name, value in found.items()}, expected)


# Adapters


def adapted(model: nn.Module, **settings: Any) -> Any:
    return models.ready(get_peft_model(model, LoraConfig(r=2, lora_dropout=0.1, **settings)))


ADAPTED = {
    "llama": lambda: adapted(models.llama(), target_modules=["q_proj", "v_proj", "down_proj"]),
    "gpt2": lambda: adapted(models.gpt2(), target_modules=["c_attn"], fan_in_fan_out=True),
    "embedding": lambda: adapted(models.llama(tie_word_embeddings=False), target_modules=["embed_tokens", "q_proj"]),
    "dora": lambda: adapted(models.llama(), target_modules=["q_proj"], use_dora=True),
    "trained too": lambda: adapted(
        models.llama(tie_word_embeddings=False), target_modules=["q_proj"], modules_to_save=["lm_head"]
    ),
}


@pytest.mark.parametrize("name", ADAPTED)
def test_adapters(name: str) -> None:
    model = ADAPTED[name]()
    found = gradients(model, text(), causal_losses)
    assert_same(found, truth(model, text(), causal_losses, one_text, 3), 1e-9)
    assert set(found) == {name for name, p in model.named_parameters() if p.requires_grad}
    by_preset = gradients(model, text(), causal_losses, "lora")
    assert set(by_preset) == {name for name in found if "lora_" in name}


def test_the_frozen_base_under_adapters() -> None:
    model = ADAPTED["llama"]()
    found = gradients(model, text(), causal_losses, r"layers\.0\.mlp")
    names = {name for name, _ in model.named_parameters() if "layers.0.mlp" in name}
    assert_same(found, truth(model, text(), causal_losses, one_text, 3, names), 1e-9)
    assert any("base_layer" in name for name in names)


# Invariances


def by_id(model: nn.Module, batches: list[tuple[list[int], dict[str, Tensor]]]) -> dict[str, Tensor]:
    """Gradients of all examples in the order of their ids, from any batches."""
    found: dict[str, list[Tensor]] = {}
    ids: list[int] = []
    with GradientCapture(model) as capture:
        for numbers, batch in batches:
            ids += numbers
            records = capture.record(batch, causal_losses, torch.tensor(numbers))
            for component, record in zip(capture.components, records, strict=True):
                found.setdefault(component.name, []).append(record.example_gradients())
                assert record.ids.tolist() == numbers
    order = torch.tensor(ids).argsort()
    return {name: torch.cat(parts)[order] for name, parts in found.items()}


@given(order=st.permutations(range(6)), cuts=st.sets(st.integers(1, 5)))
@settings(max_examples=10)
def test_batch_size_and_order_do_not_matter(order: list[int], cuts: set[int]) -> None:
    model, batch = models.llama(num_hidden_layers=1), text(6)
    edges = [0, *sorted(cuts), 6]
    groups = [order[a:b] for a, b in pairwise(edges)]
    found = by_id(model, [(group, take(batch, group)) for group in groups])
    assert_same(found, by_id(model, [(list(range(6)), batch)]), 1e-9)


def repadded(batch: dict[str, Tensor], left: int, right: int) -> dict[str, Tensor]:
    fill = {"labels": -100}
    return {k: F.pad(v, (left, right), value=fill.get(k, 0)) for k, v in batch.items()}


@given(left=st.integers(0, 3), right=st.integers(0, 3))
@settings(max_examples=10)
def test_padding_does_not_matter(left: int, right: int) -> None:
    """Llama's positions are relative, so that the side does not matter either; their angles are kept in float32."""
    model, batch = models.llama(num_hidden_layers=1), text()
    found = by_id(model, [([0, 1, 2], repadded(batch, left, right))])
    assert_same(found, by_id(model, [([0, 1, 2], batch)]), 1e-6)
