"""Estimates of `leave_group_out.py`: what every method predicts for groups of rows."""

from __future__ import annotations

import copy
from typing import Any

import torch
from group_pairs import Pair
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_influence import (
    EKFAC,
    TRAK,
    ExampleLoss,
    FactoredProjection,
    GradientDot,
    GroupEffects,
    GroupInfluence,
    TargetMatrix,
    TargetRows,
)

METHODS = ("F", "F+I", "F+B", "F+I+B", "N", "N+I")
DRAWS = 2  # labels drawn for each example
Groups = list[tuple[int | str, ...]]


class Prediction(ExampleLoss):
    """For TRAK on regression: the output, and how much it is too small."""

    reduction = "prediction"

    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0]).reshape(len(batch[0]))

    def sampled_losses(self, model: nn.Module, batch: Any, uniforms: Any) -> Tensor:
        raise ValueError("Prediction: has no labels to sample.")

    def shortfall(self, model: nn.Module, batch: Any) -> Tensor:
        return (batch[1] - model(batch[0])).reshape(len(batch[0]))


def dense_effects(pair: Pair, model: nn.Module) -> GroupEffects:
    """Logistic regression in float64 without approximation; parameters are the rows [W | b], class by class."""
    inputs, p, residuals = outputs_of(model, pair.inputs, pair.labels)
    target_inputs, q, target_residuals = outputs_of(model, pair.target_inputs, pair.target_labels)
    rows = curvature_rows(inputs, p)
    r = rows.shape[2]
    hessian = gram(rows) / len(inputs) + pair.decay * torch.eye(r).double()
    gradients = torch.einsum("no,ni->noi", residuals, inputs).flatten(1)
    target = torch.einsum("no,ni->oi", target_residuals, target_inputs).flatten() / len(q)
    curvature = TargetMatrix(gram(curvature_rows(target_inputs, q)) / len(q), "Hessian")
    return GroupEffects.from_gradients(gradients, target, curvature, hessian, rows)


def outputs_of(model: nn.Module, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs with a column of ones, probabilities and their residuals, float64."""
    p = probabilities(model, inputs)
    ones = torch.ones(len(inputs), 1).double()
    return torch.cat([inputs.double(), ones], 1), p, p - torch.nn.functional.one_hot(labels, p.shape[1])


@torch.no_grad()
def probabilities(model: nn.Module, inputs: Tensor) -> Tensor:
    found: Tensor = model(inputs.to(next(model.parameters()))).softmax(1).double()
    return found.cpu()


def curvature_rows(inputs: Tensor, p: Tensor) -> Tensor:
    """[n, classes, r] with Σ_s r_s r_s^T = (diag p - p p^T) ⊗ x x^T: row s is √p_s (e_s - p) ⊗ x."""
    roots = p.sqrt()[:, :, None] * (torch.eye(p.shape[1]).double() - p[:, None, :])
    return torch.einsum("nso,ni->nsoi", roots, inputs).flatten(2)


def gram(rows: Tensor) -> Tensor:
    flat = rows.flatten(0, 1)
    return flat.mT @ flat


def hessian_effects(pair: Pair, model: nn.Module) -> GroupEffects:
    """A small MLP at its minimum in float64: the Hessian itself, of training and target; H_S is Gauss-Newton."""
    parameters = {key: value.detach() for key, value in model.named_parameters()}
    sizes = [value.numel() for value in parameters.values()]
    flat = torch.cat([value.flatten() for value in parameters.values()])

    def loss(vector: Tensor, inputs: Tensor, labels: Tensor) -> Tensor:
        parts = zip(parameters.items(), vector.split(sizes), strict=True)
        values = {key: part.view(value.shape) for (key, value), part in parts}
        return pair.loss(torch.func.functional_call(model, values, inputs.double()), labels)

    second = torch.func.jacrev(torch.func.grad(loss), chunk_size=64)
    hessian = second(flat, pair.inputs, pair.labels) + pair.decay * torch.eye(len(flat)).double()
    target = TargetMatrix(second(flat, pair.target_inputs, pair.target_labels), "Hessian")
    gradients = example_gradients(pair, model, pair.inputs, pair.labels)
    mean = example_gradients(pair, model, pair.target_inputs, pair.target_labels).mean(0)
    return GroupEffects.from_gradients(gradients, mean, target, hessian, network_rows(pair, model, pair.inputs, DRAWS))


def network_effects(pair: Pair, model: nn.Module) -> GroupEffects:
    """MLPs in all parameters at once, through the n x n products of gradients; the Fisher is that of drawn labels.

    Groups take their H_S from the same gradients as H, so that what is left stays positive definite. Blocks of layers
    that are inverted apart, as EK-FAC has them, do not warrant that.
    """
    rows = network_rows(pair, model, pair.inputs, DRAWS).double()
    flat, n = rows.flatten(0, 1), len(rows)
    inner = torch.linalg.cholesky(flat @ flat.mT + n * pair.decay * torch.eye(len(flat)).double())

    def solve(vectors: Tensor) -> Tensor:
        """(G + λ)^-1 v = (v - R^T (n λ + R R^T)^-1 R v) / λ."""
        return (vectors - torch.cholesky_solve(flat @ vectors.mT, inner).mT @ flat) / pair.decay

    gradients = example_gradients(pair, model, pair.inputs, pair.labels).double()
    target = example_gradients(pair, model, pair.target_inputs, pair.target_labels).double().mean(0)
    curvature = TargetRows(network_rows(pair, model, pair.target_inputs, 2 * DRAWS), "sampled Fisher")
    row_shifts = solve(flat).reshape(rows.shape)
    return GroupEffects(solve(gradients), target, curvature, rows, row_shifts, ids=range(n), weight=1 / n)


def example_gradients(pair: Pair, model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    """[n, r]: of each example's own loss."""
    parameters = {key: value.detach() for key, value in model.named_parameters()}

    def loss(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return pair.loss(torch.func.functional_call(model, values, x[None]), y[None])

    inputs = inputs.to(next(model.parameters()))
    found = torch.func.vmap(torch.func.grad(loss), (None, 0, 0), chunk_size=256)(parameters, inputs, labels)
    return torch.cat([part.flatten(1) for part in found.values()], 1)


def network_rows(pair: Pair, model: nn.Module, inputs: Tensor, draws: int) -> Tensor:
    """[n, draws, r]: gradients under labels drawn from the model, their outer products adding up to the Fisher."""
    generator = torch.Generator().manual_seed(len(inputs))
    with torch.no_grad():
        outputs = model(inputs.to(next(model.parameters())))
    if pair.outputs > 1:
        drawn = torch.multinomial(outputs.softmax(1), draws, True, generator=generator)
    else:  # a residual of 1 gives the Gauss-Newton matrix itself, nothing is drawn
        drawn, draws = outputs[:, None] + 1, 1
    rows = [example_gradients(pair, model, inputs, drawn[:, k]) for k in range(draws)]
    return torch.stack(rows, 1) / draws**0.5


def ekfac_effects(pair: Pair, model: nn.Module) -> GroupInfluence:
    """EK-FAC with the weight decay as its damping, also of the groups; the exact Gauss-Newton matrix of the target."""
    model = copy.deepcopy(model).float()  # as the data is
    influence = GroupInfluence(
        model, EKFAC(damping=pair.decay), "gauss-newton", group_curvature="eigenvalues", batch_size=256, progress=False
    )
    return influence.fit(*datasets(pair))


def datasets(pair: Pair) -> tuple[TensorDataset, TensorDataset]:
    return TensorDataset(pair.inputs, pair.labels), TensorDataset(pair.target_inputs, pair.target_labels)


def additive_scores(pair: Pair, model: nn.Module, path: list[nn.Module], rates: list[float]) -> dict[str, Tensor]:
    """Scores [n] of the mean target loss; their sum over a group estimates what removing it adds to the loss."""
    train, targets = datasets(pair)
    model = copy.deepcopy(model).float()
    dots = [
        GradientDot(m.float(), batch_size=256, progress=False).score(targets, train, aggregate="mean").values[0].cpu()
        for m in (model, *path)
    ]
    return {
        "TracIn": torch.stack([rate * dot for rate, dot in zip(rates, dots[1:], strict=True)]).sum(0),
        "TRAK": trak(pair, model, train, targets),
        "gradient dot": dots[0],
    }


def trak(pair: Pair, model: nn.Module, train: TensorDataset, targets: TensorDataset) -> Tensor:
    """Scores of a query's output, weighed by what its output lacks: to first order they are scores of its loss."""
    size = min(512, len(train) // 4)
    loss = None if pair.outputs > 1 else Prediction()
    found = TRAK(model, FactoredProjection(size), loss, batch_size=256, progress=False, damping_share=1e-3).fit(train)
    scores = found.score(targets).total().cpu()
    if pair.outputs > 1:
        lacking = 1 - probabilities(model, pair.target_inputs).gather(1, pair.target_labels[:, None])
    else:
        with torch.no_grad():
            lacking = pair.target_labels - model(pair.target_inputs)
    return (lacking * scores).mean(0)


def estimates(effects: GroupEffects | GroupInfluence, scores: dict[str, Tensor], groups: Groups) -> dict[str, Tensor]:
    """Predicted change of the target loss by every method, [g]; a method that refuses says why and is left out."""
    found: dict[str, Tensor] = {}
    for method in METHODS:
        try:
            found[method] = effects.estimates(groups, method, "removal").cpu()
        except ValueError as error:  # the Newton step needs a positive definite rest
            print(f"  {method} is not defined here: {error}")
    for name, values in scores.items():
        found[name] = torch.stack([values[list(map(int, group))].sum() for group in groups])
    return found
