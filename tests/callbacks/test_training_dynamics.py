"""The whole way: a language model is trained with a recorder; TracIn, a table and a heat map come of its stores."""

from __future__ import annotations

import csv
import io
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, seed_everything
from torch.utils.data import DataLoader

from lightning_influence.callbacks.gradient_dot_recorder import GradientDotRecorder
from lightning_influence.callbacks.records import find_records
from lightning_influence.estimators.component_dots import ComponentDots
from lightning_influence.estimators.tracin import TracIn
from lightning_influence.report.component_importance import component_importance
from lightning_influence.store import Store
from tests.callbacks.toys import every_step, trainer

transformers = pytest.importorskip("transformers")

TRAIN = [
    "the red fox runs over a hill",
    "two and two make four",
    "the old king had three sons",
    "rain falls on the green sea",
    "she sings a song of spring",
    "bread and salt and water",
    "four wheels and one old car",
    "the moon is a cold stone",
]
QUERIES = ["a fox that is red runs on a hill", "four is two and two", "cold stone in the sky is the moon"]
SOURCES = [0, 1, 7]
WORDS = sorted({word for text in [*TRAIN, *QUERIES] for word in text.split()})


def rows(texts: list[str]) -> list[dict[str, Any]]:
    return [{"text": text, "ids": [1 + WORDS.index(word) for word in text.split()]} for text in texts]


def padded(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row["ids"]) for row in batch], batch_first=True)
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": ids.masked_fill(ids == 0, -100)}


class Llama(LightningModule):
    """Two layers with grouped-query attention, trained by SGD with a warm-up."""

    def __init__(self) -> None:
        super().__init__()
        config = transformers.LlamaConfig(
            vocab_size=1 + len(WORDS),
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=16,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=None,
        )
        self.model = transformers.LlamaForCausalLM(config)

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss: torch.Tensor = self.model(**batch).loss
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.2)
        warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 5))
        return [optimizer], [{"scheduler": warm_up, "interval": "step"}]


def gradients(model: Llama, texts: list[str]) -> torch.Tensor:
    """[n, P]: of the sum over an example's tokens, one example at a time."""
    found = []
    for row in rows(texts):
        batch = padded([row])
        loss = model.model(**batch).loss * (len(row["ids"]) - 1)
        parts = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
        found.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(found)


def test_from_fit_to_heat_map(tmp_path):
    seed_everything(0, verbose=False)
    recorder = GradientDotRecorder(rows(QUERIES), candidates=3, text="text", when="checkpoint", batch_positions=32)
    pool = DataLoader(rows(TRAIN), batch_size=4, collate_fn=padded, shuffle=True)
    trainer(tmp_path, [recorder, every_step(tmp_path, 2)], max_epochs=3).fit(Llama(), pool)

    records = find_records(recorder.root)  # as a later process finds them
    assert [record.step for record in records] == [2, 4, 6]
    rates = [Store.open(record.path).read_json("learning_rates") for record in records]
    for rate, now, last in zip(rates, (0.12, 0.2, 0.2), (0.08, 0.16, 0.2), strict=True):
        assert rate["next"] == pytest.approx(dict.fromkeys(rate["next"], now))
        assert rate["last"] == pytest.approx(dict.fromkeys(rate["next"], last))

    summed = TracIn.from_records(records).dots()
    expected = torch.zeros(len(QUERIES), len(TRAIN))
    for record, rate in zip(records, (0.12, 0.2, 0.2), strict=True):
        model = Llama.load_from_checkpoint(record.checkpoint).eval()
        expected += rate * gradients(model, QUERIES) @ gradients(model, TRAIN).T
    pairs = [expected[q, i] for q, ids in enumerate(summed.candidates()) for i in ids]
    torch.testing.assert_close(summed.total().float(), torch.stack(pairs), rtol=1e-4, atol=1e-4)
    assert all(source in ids for source, ids in zip(SOURCES, summed.candidates(), strict=True))

    recordings = [ComponentDots.load(Store.open(record.path)) for record in records]
    found = component_importance(recordings, SOURCES)
    assert found.checkpoints == ("step 2", "step 4", "step 6")
    assert found.values.shape == (3, len(summed.components))
    assert {place.layer for place in found.places} == {None, 0, 1}
    assert len(set(found.places)) == len(found.places)
    assert len(list(csv.reader(io.StringIO(found.csv())))) == 1 + 3 * len(summed.components)
    assert "model.model.layers.1.mlp.up_proj" in found.markdown()
    pytest.importorskip("matplotlib")
    found.heat_map(tmp_path / "importance.png")
    assert (tmp_path / "importance.png").exists()
