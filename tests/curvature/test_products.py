from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from lightning_influence.capture import LanguageModelLoss, RegressionLoss, find_components, parameter_gradients
from lightning_influence.curvature import GaussNewtonProduct, HessianProduct
from tests.curvature import oracles_second_order as truths
from tests.curvature.models import (
    VOCABULARY,
    DeadEnd,
    Images,
    Mixed,
    Tokens,
    batch_of,
    images,
    labels,
    loss_of,
    mlp,
    normal,
    points,
    ready,
    texts,
    token_rows,
)

CASES = [(Mixed, token_rows(5)), (Tokens, texts(4)), (Images, images(5)), (mlp, points(6))]


def build(case: Any) -> nn.Module:
    return mlp() if case is mlp else ready(case())


def dense(product: Any) -> Tensor:
    return product(torch.eye(product.size, dtype=torch.float64))


def by_parameter(model: nn.Module, matrix: Tensor) -> Tensor:
    """A matrix over the components' gradients as one over ``model.parameters()``."""
    components = find_components(model)
    blocks = torch.split(torch.eye(len(matrix), dtype=torch.float64), [c.numel for c in components], dim=1)
    parts: dict[str, Tensor] = {}
    for component, block in zip(components, blocks, strict=True):
        parts |= parameter_gradients(model, component, block.reshape(-1, *component.shape))
    moved = torch.cat([parts[name].reshape(len(matrix), -1) for name, _ in model.named_parameters()], dim=1)
    return moved.T @ matrix @ moved


def logits_of_row(model: nn.Module, row: Any, position: int | None = None) -> Tensor:
    """Logits of one example, or of one of its supervised positions."""
    batch = batch_of(row)
    if not isinstance(batch, dict):
        return model(batch[0])[0]
    logits = model(batch["input_ids"], batch["attention_mask"])[0, :-1]
    return logits[batch["labels"][0, 1:] != -100][position]


@pytest.mark.parametrize(("case", "data"), CASES)
def test_hessian(case: Any, data: list[Any]) -> None:
    model = build(case)
    losses = [lambda k=k: loss_of(model, data[k], k) for k in range(len(data))]
    found = by_parameter(model, dense(HessianProduct(model, find_components(model), data)))
    torch.testing.assert_close(found, truths.hessian(list(model.parameters()), losses))


@pytest.mark.parametrize(("case", "data"), CASES)
def test_gauss_newton_of_softmax_outputs(case: Any, data: list[Any]) -> None:
    """Every supervised position counts with its whole weight; the sum over them is that of the example."""
    model = build(case)
    counts = [int((row["labels"][1:] != -100).sum()) if isinstance(row, dict) else 1 for row in data]
    places = [(k, t) for k, count in enumerate(counts) for t in range(count)]
    outputs = [lambda k=k, t=t: logits_of_row(model, data[k], t) for k, t in places]
    expected = truths.gauss_newton(list(model.parameters()), outputs, truths.softmax_curve) * len(places) / len(data)
    found = by_parameter(model, dense(GaussNewtonProduct(model, find_components(model), data)))
    torch.testing.assert_close(found, expected)


def test_gauss_newton_of_squared_error() -> None:
    model, x = mlp(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), normal(6, 3)
    data = list(zip(x, normal(6, 2, seed=1), strict=True))
    outputs = [lambda row=row: model(row[None])[0] for row in x]
    expected = truths.gauss_newton(list(model.parameters()), outputs, lambda z: torch.eye(len(z)).double())
    product = GaussNewtonProduct(model, find_components(model), data, RegressionLoss())
    torch.testing.assert_close(by_parameter(model, dense(product)), expected)


def test_it_is_the_fisher_over_all_labels() -> None:
    """Σ_y p(y) g_y g_yᵀ, one label at a time: no label of the data enters."""
    model, x = mlp(), normal(5, 3)
    total = torch.zeros(28, 28, dtype=torch.float64)
    for row in x:
        chances = torch.softmax(model(row[None])[0].detach(), 0)
        for label, chance in enumerate(chances):
            loss = F.cross_entropy(model(row[None]), torch.tensor([label]))
            g = torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(model.parameters()))])
            total += chance * torch.outer(g, g) / len(x)
    for seed in (0, 1):
        product = GaussNewtonProduct(model, find_components(model), list(zip(x, labels(5, 3, seed), strict=True)))
        torch.testing.assert_close(by_parameter(model, dense(product)), total)


@pytest.mark.parametrize("kind", [GaussNewtonProduct, HessianProduct])
def test_a_mean_over_tokens_weighs_each_by_its_share(kind: Any) -> None:
    model, data = ready(Tokens()), texts(4)
    alone = []
    for row in data:
        count = int((row["labels"][1:] != -100).sum())
        alone.append(dense(kind(model, find_components(model), [row], LanguageModelLoss())) / count)
    found = dense(kind(model, find_components(model), data, LanguageModelLoss("mean")))
    torch.testing.assert_close(found, torch.stack(alone).mean(0))


@pytest.mark.parametrize("kind", [GaussNewtonProduct, HessianProduct])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_batches_rows_blocks_and_parts(kind: Any, batch_size: int) -> None:
    model, data = ready(Mixed()), token_rows(5)
    components = find_components(model)
    loader = torch.utils.data.DataLoader(data, batch_size=batch_size)
    product = kind(model, components, loader)
    matrix = dense(kind(model, components, data))
    vectors = normal(3, product.size)
    torch.testing.assert_close(product(vectors), vectors @ matrix)
    torch.testing.assert_close(product(vectors[1:2]), vectors[1:2] @ matrix)
    start = components[0].numel
    block = product.restricted(components[1:3])
    torch.testing.assert_close(dense(block), matrix[start : start + block.size, start : start + block.size])
    torch.testing.assert_close(dense(product.on([3, 1])), dense(kind(model, components, [data[1], data[3]])))
    assert product.size == sum(c.numel for c in components)


@pytest.mark.parametrize("kind", [GaussNewtonProduct, HessianProduct])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_an_example_without_a_label_counts_as_one_without_a_loss(kind: Any, batch_size: int) -> None:
    model, data = ready(Tokens()), texts(4)
    components = find_components(model)
    silent = {**data[1], "labels": torch.full_like(data[1]["labels"], -100)}
    loader = torch.utils.data.DataLoader([*data, silent], batch_size=batch_size)
    torch.testing.assert_close(
        dense(kind(model, components, loader)), dense(kind(model, components, data)) * 4 / 5, rtol=1e-9, atol=1e-12
    )


def test_a_frozen_layer_that_is_named_counts_and_others_are_constants() -> None:
    model, data = mlp(), points(6)
    whole = dense(HessianProduct(model, find_components(model), data))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    [component] = find_components(model, "2")
    torch.testing.assert_close(dense(HessianProduct(model, [component], data)), whole[16:, 16:])
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("kind", [GaussNewtonProduct, HessianProduct])
def test_the_model_is_left_as_it_was(kind: Any) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3)).double().train()
    model[0].weight.grad = torch.ones(4, 3, dtype=torch.float64)
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    product = kind(model, find_components(model), points(6))
    with torch.no_grad():
        first = product(normal(2, product.size))
    with torch.inference_mode():
        assert torch.equal(product(normal(2, product.size)), first)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(module.training for module in model)
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(model[0].weight.grad, torch.ones(4, 3, dtype=torch.float64))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_narrow_weights_have_float32_products() -> None:
    rows = [(x.bfloat16(), y) for x, y in points(6)]
    model = mlp().bfloat16()
    product = GaussNewtonProduct(model, find_components(model), rows)
    assert product.like.dtype == torch.float32
    vectors = normal(2, product.size).float()
    found = product(vectors)
    assert found.dtype == torch.float32
    expected = GaussNewtonProduct(model.float(), find_components(model), [(x.float(), y) for x, y in rows])(vectors)
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.05)


class Head(nn.Module):
    """A module with a loss of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 3)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Any:
        return self.wrapped(self.body(x).tanh())

    def wrapped(self, z: Tensor) -> Any:
        return z

    def example_losses(self, batch: Any) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1], reduction="none")


class AsObject(Head):
    def wrapped(self, z: Tensor) -> Any:
        return SimpleNamespace(logits=z, hidden=z.detach())

    def example_losses(self, batch: Any) -> Tensor:
        return F.cross_entropy(self(batch[0]).logits, batch[1], reduction="none")


class AsTuple(Head):
    def wrapped(self, z: Tensor) -> Any:
        return (z, {"hidden": z})

    def example_losses(self, batch: Any) -> Tensor:
        return F.cross_entropy(self(batch[0])[0], batch[1], reduction="none")


class Scaled(Head):
    def example_losses(self, batch: Any) -> Tensor:
        return F.cross_entropy(self(batch[0]) * self.scale, batch[1], reduction="none")


class Beside(Head):
    def example_losses(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.body(batch[0]), batch[1], reduction="none")


class Linear(Head):
    def example_losses(self, batch: Any) -> Tensor:
        return self(batch[0]).sum(1)


class Detached(Head):
    def example_losses(self, batch: Any) -> Tensor:
        return self(batch[0]).detach().sum(1)


@pytest.mark.parametrize("kind", [AsObject, AsTuple])
def test_outputs_of_any_form(kind: Any) -> None:
    model, data = ready(kind()), points(4)
    components = find_components(model, "body")
    found = dense(GaussNewtonProduct(model, components, data))
    torch.testing.assert_close(found, dense(GaussNewtonProduct(ready(Head()), components, data)))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            Scaled,
            r"the loss \(ModuleLoss\) depends on the parameters not only through what Scaled returns.*the Hessian",
        ),
        (Beside, r"the loss called Beside 0 times; expected once.*example_losses, or ask for the Hessian"),
        (Linear, r"the loss \(ModuleLoss\) is linear in what the model returns.*Let forward return logits"),
        (Detached, r"the loss \(ModuleLoss\) does not depend on the parameters through what Detached returns"),
    ],
)
def test_losses_without_a_gauss_newton_matrix(kind: Any, message: str) -> None:
    model = ready(kind())
    product = GaussNewtonProduct(model, find_components(model, [".*"]), points(4))
    with pytest.raises(ValueError, match=f"`GaussNewtonProduct`: {message}"):
        product(normal(1, product.size))


def test_the_hessian_of_those_losses() -> None:
    for kind in (Scaled, Beside):
        model, data = ready(kind()), points(4)
        losses = [lambda row=row, model=model: model.example_losses(batch_of(row))[0] for row in data]
        product = HessianProduct(model, find_components(model, [".*"]), data)
        expected = truths.hessian(list(model.parameters()), losses)
        torch.testing.assert_close(by_parameter(model, dense(product)), expected)
    model = mlp(nn.Linear(3, 2))
    linear = HessianProduct(model, find_components(model), points(4), lambda model, batch: model(batch[0]).sum(1))
    assert not dense(linear).any()


def test_bad_examples_are_named() -> None:
    model, data = mlp(), points(9)
    data[7] = (data[7][0] * torch.inf, data[7][1])
    product = HessianProduct(model, find_components(model), torch.utils.data.DataLoader(data, 4))
    with pytest.raises(ValueError, match=r"the loss of 1 of 4 examples is not finite \(ids \[7\]\)"):
        product(normal(1, product.size))
    steep = HessianProduct(model, find_components(model), points(3), lambda m, b: m(b[0]).sum(1).sub(9).abs() ** 1e200)
    with pytest.raises(ValueError, match="3 of 3 examples is not finite"):
        steep(normal(1, product.size))
    root = lambda m, b: (m(b[0]) - m(b[0]).detach()).abs().sum(1).sqrt()  # noqa: E731
    with pytest.raises(ValueError, match=r"second derivatives of a batch are not finite \(ids \[0, 1, 2\]\)"):
        HessianProduct(model, find_components(model), points(3), root)(normal(1, product.size))
    with pytest.raises(ValueError, match=r"the loss of a batch of 3 examples has shape \(\); expected one loss"):
        HessianProduct(model, find_components(model), points(3), lambda m, b: m(b[0]).sum())(normal(1, product.size))


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * gradient


class Square(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Once.apply(x)


@pytest.mark.parametrize("kind", [GaussNewtonProduct, HessianProduct])
def test_a_model_without_second_derivatives(kind: Any) -> None:
    model = mlp(nn.Linear(3, 4), Square(), nn.Linear(4, 3))
    product = kind(model, find_components(model), points(4))
    with pytest.raises(
        ValueError, match=rf"`{kind.__name__}`: Sequential or its loss .* cannot be differentiated twic"
    ):
        product(normal(1, product.size))


@pytest.mark.parametrize("kind", [GaussNewtonProduct, HessianProduct])
def test_a_loss_without_second_derivatives(kind: Any) -> None:
    """Autograd would take it for linear, and say nothing."""

    class Own(LanguageModelLoss):
        def losses(self, model: nn.Module, batch: Any) -> Tensor:
            return DeadEnd.apply(super().losses(model, batch))

    model = ready(Tokens())
    product = kind(model, find_components(model), texts(4), Own())
    with pytest.raises(ValueError, match=r"its loss \(Own\) cannot be differentiated twice: .*once_differentiable"):
        product(normal(1, product.size))


def test_changed_weights_are_noticed() -> None:
    model = mlp(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    product = HessianProduct(model, find_components(model), points(4))
    product.check_weights()
    for tensor, name in ((model[2].weight, "2.weight"), (model[1].running_mean, "1.running_mean")):
        before = tensor.detach().clone()
        tensor.data[0] += 1e-6
        with pytest.raises(ValueError, match=rf"Sequential.{name} has changed since the curvature was fitted"):
            product.check_weights()
        tensor.data.copy_(before)
        product.check_weights()


def test_attention_has_second_derivatives_whatever_it_is_set_to() -> None:
    """The fused kernels have none, and are not taken."""
    found = []
    for attention in ("sdpa", "eager"):
        config = transformers.GPTNeoXConfig(
            vocab_size=VOCABULARY, hidden_size=4, num_hidden_layers=1, num_attention_heads=2, intermediate_size=4
        )
        config._attn_implementation = attention
        model = ready(transformers.GPTNeoXForCausalLM(config))
        components = find_components(model, "attention")
        vectors = normal(2, sum(c.numel for c in components))
        data = [row for row in texts(6) if row["attention_mask"][0]]  # transformers' eager formula fails on others
        found += [kind(model, components, data)(vectors) for kind in (GaussNewtonProduct, HessianProduct)]
    torch.testing.assert_close(found[:2], found[2:])
    assert not torch.allclose(found[0], found[1])
