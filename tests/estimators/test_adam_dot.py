"""LESS at one checkpoint against literal references: one autograd call and one flat vector an example."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from lightning_influence.capture import Component, ExampleLoader, LanguageModelLoss, find_components
from lightning_influence.capture.record import DenseRecord
from lightning_influence.curvature.adam import AdamMoments
from lightning_influence.estimators.adam_dot import AdamDot, load_moments, save_moments
from lightning_influence.projections import FactoredProjection, LoGra, Projection, TrakProjection
from lightning_influence.store import Store
from tests.capture.models import llama

EXACT = FactoredProjection(1.0)  # a signed permutation: changes no inner product


def sentences(n: int, seed: int, vocabulary: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for k in range(n):
        tokens = torch.randint(1, vocabulary, (6,), generator=generator)
        mask = (torch.arange(6) < 4 + k % 3).long()
        labels = tokens.masked_fill(mask == 0, -100)
        labels[:2] = -100
        rows.append({"input_ids": tokens, "attention_mask": mask, "labels": labels})
    return rows


@pytest.fixture(scope="module")
def setting() -> tuple[nn.Module, torch.optim.Optimizer, list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """LoRA on a small Llama after four steps of Adam, whose parameters stand in another order than in the model."""
    torch.manual_seed(0)
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"])).double()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable[::-1], lr=1e-2, betas=(0.8, 0.99), eps=1e-6)
    size = model.config.vocab_size
    for row in sentences(4, 5, size):
        optimizer.zero_grad()
        loss_of(model, row).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model.eval(), optimizer, sentences(3, 1, size), sentences(7, 2, size)


def loss_of(model: nn.Module, row: dict[str, Tensor]) -> Tensor:
    """Mean over the tokens of one sequence, as a batch of one is trained on."""
    logits = model(input_ids=row["input_ids"][None], attention_mask=row["attention_mask"][None]).logits[0]
    return F.cross_entropy(logits[:-1], row["labels"][1:], ignore_index=-100)


def flat_gradient(model: nn.Module, row: dict[str, Tensor]) -> Tensor:
    trainable = [p for p in model.parameters() if p.requires_grad]
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss_of(model, row), trainable)])


def flat_state(model: nn.Module, optimizer: torch.optim.Optimizer, key: str) -> Tensor:
    return torch.cat([optimizer.state[p][key].flatten() for p in model.parameters() if p.requires_grad])


def less(model, optimizer, queries, train, matrix: Tensor | None = None) -> Tensor:
    """The paper: bias-corrected moments, eps beside the root, the optimizer's betas; then a projection, if any."""
    matrix = torch.eye(112, dtype=torch.float64) if matrix is None else matrix
    (beta1, beta2), eps = (optimizer.defaults[key] for key in ("betas", "eps"))
    m_before, v_before = flat_state(model, optimizer, "exp_avg"), flat_state(model, optimizer, "exp_avg_sq")
    t = int(next(iter(optimizer.state.values()))["step"]) + 1
    scores = torch.zeros(len(queries), len(train), dtype=torch.float64)
    for i, row in enumerate(train):
        g = flat_gradient(model, row)
        m_hat = (beta1 * m_before + (1 - beta1) * g) / (1 - beta1**t)
        v_hat = (beta2 * v_before + (1 - beta2) * g * g) / (1 - beta2**t)
        gamma = matrix @ (m_hat / (v_hat.sqrt() + eps))
        for q, query in enumerate(queries):
            target = matrix @ flat_gradient(model, query)
            scores[q, i] = (target @ gamma) / (target.norm() * gamma.norm())
    return scores


def less_repo(model, optimizer, queries, train) -> Tensor:
    """The authors' code: no bias correction, 1e-8 under the root, betas 0.9 and 0.999 whatever the optimizer's."""
    avg, avg_sq = flat_state(model, optimizer, "exp_avg"), flat_state(model, optimizer, "exp_avg_sq")
    scores = torch.zeros(len(queries), len(train), dtype=torch.float64)
    for i, row in enumerate(train):
        g = flat_gradient(model, row)
        updated_avg = 0.9 * avg + 0.1 * g
        updated_avg_sq = 0.999 * avg_sq + 0.001 * g**2
        gamma = updated_avg / torch.sqrt(updated_avg_sq + 1e-8)
        for q, query in enumerate(queries):
            target = flat_gradient(model, query)
            scores[q, i] = (target @ gamma) / (target.norm() * gamma.norm())
    return scores


def moments_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> AdamMoments:
    return AdamMoments.from_optimizers(model, find_components(model, "lora"), optimizer)


@pytest.mark.parametrize(("variant", "reference"), [("less", less), ("less_repo", less_repo)])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_reference(setting: Any, variant: Any, reference: Any, batch_size: int) -> None:
    model, optimizer, queries, train = setting
    estimator = AdamDot(
        model, moments_of(model, optimizer), EXACT, components="lora", variant=variant, batch_size=batch_size
    )
    found = estimator.score(queries, train)
    torch.testing.assert_close(found.values, reference(model, optimizer, queries, train), rtol=1e-7, atol=1e-9)
    assert (found.query_ids, found.train_ids, found.reduction) == ((0, 1, 2), tuple(range(7)), "mean")
    assert found.formula.startswith(f"cos(R g_q, R Adam(g_i)), {variant}, R: FactoredProjection to ")
    parts = estimator.score(queries, ExampleLoader(train, indices=[4, 0]), per_component=True)
    assert parts.components == tuple(c.name for c in estimator.components)
    torch.testing.assert_close(parts.total(), found.values[:, [4, 0]])


def test_the_variants_differ(setting: Any) -> None:
    model, optimizer, queries, train = setting
    assert not torch.allclose(less(*setting), less_repo(*setting), atol=1e-3)
    plain = AdamDot(model, moments_of(model, optimizer), EXACT, components="lora", normalise=False)
    ratio = plain.score(queries, train).values / less(*setting)
    lengths = torch.stack([flat_gradient(model, query) for query in queries]).norm(dim=1)
    torch.testing.assert_close(ratio[1] / ratio[0], (lengths[1] / lengths[0]).expand(7))


def matrix_of(projection: Projection, components: list[Component]) -> Tensor:
    """R, dense [k, P]: what the projection makes of every unit vector."""
    blocks = []
    for c in components:
        units = torch.eye(c.numel, dtype=torch.float64).reshape(c.numel, *c.shape)
        blocks.append(projection.project(c, DenseRecord(torch.arange(c.numel), units)).double().T)
    return torch.block_diag(*blocks)


@pytest.mark.parametrize(
    "projection",
    [FactoredProjection(40), TrakProjection(60, kind="rademacher"), LoGra(32)],
    ids=lambda p: type(p).__name__,
)
def test_both_sides_are_projected_after_the_step(setting: Any, projection: Projection) -> None:
    model, optimizer, queries, train = setting
    estimator = AdamDot(model, moments_of(model, optimizer), projection, components="lora")
    matrix = matrix_of(estimator.projection, estimator.components)
    found = estimator.score(queries, train)
    torch.testing.assert_close(found.values.double(), less(*setting, matrix=matrix), rtol=1e-4, atol=1e-5)
    assert type(projection).__name__ in found.formula


def test_the_projection_of_less_is_the_default(setting: Any) -> None:
    model, optimizer, _, _ = setting
    default = AdamDot(model, moments_of(model, optimizer), components="lora").projection
    assert (type(default), default.kind) == (TrakProjection, "rademacher")
    assert default.total == sum(c.numel for c in find_components(model, "lora")) < 8192


def test_an_example_without_a_target_has_no_score(setting: Any) -> None:
    """Its gradient is 0, but the step of Adam would be that of the momentum."""
    model, optimizer, queries, train = setting
    empty = {**train[0], "labels": torch.full((6,), -100)}
    found = AdamDot(model, moments_of(model, optimizer), EXACT, components="lora").score(queries, [train[1], empty])
    assert found.values[:, 1].tolist() == [0, 0, 0]
    assert bool((found.values[:, 0] != 0).all())
    with pytest.raises(ValueError, match=r"1 of 2 queries have no supervised target \(ids \[1\]\)"):
        AdamDot(model, moments_of(model, optimizer), EXACT, components="lora").score([train[1], empty], train)


def test_a_loss_of_ones_own_is_taken_as_it_is(setting: Any) -> None:
    model, optimizer, queries, train = setting
    estimator = AdamDot(model, moments_of(model, optimizer), EXACT, LanguageModelLoss("sum"), "lora")
    found = estimator.score(queries, train)
    assert found.reduction == "sum"
    assert not torch.allclose(found.values, less(*setting), atol=1e-4)


def test_moments_in_a_store(setting: Any, tmp_path: Any) -> None:
    model, optimizer, _, _ = setting
    moments, components = moments_of(model, optimizer), find_components(model, "lora")
    save_moments(Store.create(tmp_path / "store", model, components), moments)
    again = load_moments(Store.open(tmp_path / "store"))
    assert again.states == moments.states
    for name in moments.first:
        assert torch.equal(again.first[name], moments.first[name])
        assert torch.equal(again.second[name], moments.second[name])


def test_bad_input(setting: Any) -> None:
    model, optimizer, _, _ = setting
    moments = moments_of(model, optimizer)
    with pytest.raises(ValueError, match=re.escape("`AdamDot(variant='LESS')`: expected 'less', with bias")):
        AdamDot(model, moments, EXACT, components="lora", variant="LESS")
    with pytest.raises(ValueError, match=r"components have no moments of their shape there \(\["):
        AdamDot(model, moments, EXACT, components="mlp")
