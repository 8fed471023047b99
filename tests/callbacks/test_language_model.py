"""The hardest training there is on one CPU: LoRA, reentrant checkpointing, mixed precision, accumulation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, seed_everything
from torch.utils.data import DataLoader, Dataset

from lightning_influence.callbacks.curvature_recorder import CurvatureRecorder
from lightning_influence.callbacks.gradient_dot_recorder import GradientDotRecorder
from lightning_influence.curvature import EKFAC
from lightning_influence.estimators.scores import Scores
from lightning_influence.store import Store
from tests.callbacks.toys import assert_same, every_step, trainer

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")


class Sentences(Dataset[dict[str, torch.Tensor]]):
    """Random tokens of different lengths, padded on the right."""

    def __init__(self, n: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.tokens = torch.randint(1, 40, (n, 8), generator=generator)
        self.lengths = torch.randint(3, 9, (n,), generator=generator)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, k: int) -> dict[str, torch.Tensor]:
        mask = (torch.arange(8) < self.lengths[k]).long()
        labels = self.tokens[k].masked_fill(mask == 0, -100)
        return {"input_ids": self.tokens[k], "attention_mask": mask, "labels": labels}


class Chat(LightningModule):
    """GPT-2 with LoRA; the module has no forward of its own."""

    def __init__(self) -> None:
        super().__init__()
        config = transformers.GPT2Config(
            vocab_size=40, n_positions=8, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
        )
        lora = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, lora_dropout=0.1)
        self.model = peft.get_peft_model(transformers.GPT2LMHeadModel(config), lora)
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        self.model.enable_input_require_grads()

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        loss: torch.Tensor = self.model(**batch).loss
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def train(folder, recorders):
    seed_everything(0, verbose=False)
    model = Chat().train()
    settings = {"precision": "bf16-mixed", "accumulate_grad_batches": 2, "max_epochs": 1}
    running = trainer(folder, [*recorders, every_step(folder, 2)], **settings)
    running.fit(model, DataLoader(Sentences(16, 1), batch_size=2, shuffle=True))
    return model, {"weights": model.state_dict(), "metrics": running.logged_metrics, "random": torch.rand(3)}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_training_is_bit_identical_and_the_recordings_are_complete(tmp_path):
    dots = GradientDotRecorder(Sentences(3, 2), components="lora", when="checkpoint", batch_size=4)
    factors = CurvatureRecorder(EKFAC(), components="lora", batch_size=4)
    _, plain = train(tmp_path / "plain", [])
    model, recorded = train(tmp_path / "recorded", [dots, factors])
    assert_same(recorded, plain)
    assert [record.step for record in dots.records] == [2, 4]
    scores = Scores.load(Store.open(dots.records[-1].path))
    assert scores.values.shape == (4, 3, 16)
    assert scores.reduction == "sum"
    assert all("lora_" in name for name in scores.components)
    assert scores.values.isfinite().all()
    Store.open(factors.records[-1].path).verify(model)
