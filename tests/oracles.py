"""Slow truths in float64, written from the formulas alone; nothing here imports the package."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

# Influence of a group, dense ([IA] sections 3.1 and 3.2)


def parameter_shifts(gradients: Tensor, hessian: Tensor, weight: float) -> Tensor:
    """u_i = weight · H⁻¹ g_i [n, p]: what removing example i does to the parameters."""
    return weight * torch.stack([torch.linalg.inv(hessian) @ gradient for gradient in gradients])


def group_influence(
    shifts: Tensor,
    target_gradient: Tensor,
    target_hessian: Tensor,
    rows: Sequence[int],
    change: str,
    interactions: bool,
) -> float:
    """F or F+I of removing or adding the rows."""
    shift = torch.zeros_like(target_gradient)
    for row in rows:
        shift = shift + shifts[row] if change == "removal" else shift - shifts[row]
    second = 0.5 * shift @ target_hessian @ shift if interactions else 0.0
    return float(target_gradient @ shift + second)


def group_estimate(
    gradients: Tensor,
    hessian: Tensor,
    member_hessians: Tensor,
    target_gradient: Tensor,
    target_hessian: Tensor,
    rows: Sequence[int],
    method: str,
    change: str,
    weight: float,
) -> float:
    """F, F+I, F+B, F+I+B, N or N+I of removing or adding the rows, with the matrices H, H_i and H_f as they are."""
    epsilon = -weight if change == "removal" else weight  # weight that the group gets on top of its own
    total = sum((gradients[row] for row in rows), torch.zeros_like(target_gradient))
    own = sum((member_hessians[row] for row in rows), torch.zeros_like(hessian))
    inverse = torch.linalg.inv(hessian)
    if method.startswith("N"):
        shift = -epsilon * torch.linalg.inv(hessian + epsilon * own) @ total
    else:
        shift = -epsilon * inverse @ total
    value = target_gradient @ shift
    if method.endswith("B"):  # half the second derivative of the minimiser in epsilon, times epsilon²
        value = value + epsilon**2 * target_gradient @ inverse @ own @ inverse @ total
    if "I" in method:
        value = value + 0.5 * shift @ target_hessian @ shift
    return float(value)


def addition_objective(values: Tensor, interactions: Tensor, rows: Sequence[int]) -> float:
    """−Σ b_i + ½ Σ_ij K_ij, one pair at a time, from the dense K [n, n]."""
    total = 0.0
    for i in rows:
        total -= float(values[i])
        for j in rows:
            total += 0.5 * float(interactions[i, j])
    return total


def greedy(values: Tensor, interactions: Tensor, budget: int, ids: Sequence[int | str]) -> list[int]:
    """Algorithm 1 by trying every row at every step; the smallest id among equally good ones."""
    chosen: list[int] = []
    for _ in range(budget):
        left = [row for row in range(len(values)) if row not in chosen]
        outcome = {row: addition_objective(values, interactions, [*chosen, row]) for row in left}
        best = min(outcome.values())
        chosen.append(min((row for row in left if outcome[row] <= best + 1e-10), key=lambda row: ids[row]))
    return chosen


def newton_objective(
    values: Tensor, features: Tensor, metric: Tensor | None, rows: Sequence[int], damping: float | Tensor
) -> float:
    """−b̄ᵀw + ½ wᵀMw of the Newton step w = Φ_Sᵀ(D + Φ_SΦ_Sᵀ)⁻¹1, one dense solve; D of one damping or one a row."""
    if not rows:
        return 0.0
    chosen = features[list(rows)].double()
    diagonal = (torch.zeros(len(values)).double() + damping)[list(rows)].diag()
    alpha = torch.linalg.solve(diagonal + chosen @ chosen.T, torch.ones(len(rows)).double())
    w = chosen.T @ alpha
    return float(0.5 * w @ (w if metric is None else metric.double() @ w) - alpha @ values[list(rows)].double())


def newton_damping(features: Tensor, ridge: float) -> float:
    """A share of the mean squared length of the features; the share itself where all are 0."""
    mean = sum(float(row.double() @ row.double()) for row in features) / len(features)
    return ridge * mean if mean > 0 else ridge


def newton_greedy(
    values: Tensor,
    features: Tensor,
    metric: Tensor | None,
    budget: int,
    ids: Sequence[int | str],
    damping: float | Tensor,
) -> list[int]:
    """The row that lowers `newton_objective` most, by trying every row at every step; ties by id."""
    chosen: list[int] = []
    for _ in range(budget):
        left = [row for row in range(len(values)) if row not in chosen]
        outcome = {row: newton_objective(values, features, metric, [*chosen, row], damping) for row in left}
        best = min(outcome.values())
        chosen.append(min((row for row in left if outcome[row] <= best + 1e-10), key=lambda row: ids[row]))
    return chosen


# Logistic regression, exact: mean loss plus ½ · decay · ‖θ‖²


def binary_probabilities(inputs: Tensor, parameters: Tensor) -> Tensor:
    """p_i = P(y_i = 1) [n]."""
    return torch.sigmoid(inputs @ parameters)


def binary_gradients(inputs: Tensor, labels: Tensor, parameters: Tensor) -> Tensor:
    """Gradient (p_i − y_i) x_i of each example's loss, without the decay [n, d]."""
    return (binary_probabilities(inputs, parameters) - labels)[:, None] * inputs


def binary_hessian(inputs: Tensor, parameters: Tensor, decay: float) -> Tensor:
    """Hessian of the mean loss and the decay [d, d]."""
    p = binary_probabilities(inputs, parameters)
    return (inputs.T * (p * (1 - p))) @ inputs / len(inputs) + decay * torch.eye(inputs.shape[1]).double()


def fit_binary(inputs: Tensor, labels: Tensor, decay: float) -> Tensor:
    """Minimiser by Newton's method [d]."""
    theta = torch.zeros(inputs.shape[1], dtype=torch.float64)
    for _ in range(50):
        slope = binary_gradients(inputs, labels, theta).mean(dim=0) + decay * theta
        if slope.abs().max() < 1e-13:
            break
        theta = theta - torch.linalg.solve(binary_hessian(inputs, theta, decay), slope)
    return theta


def softmax_probabilities(inputs: Tensor, parameters: Tensor) -> Tensor:
    """Class probabilities [n, c] of a linear model with parameters [c · d], the rows of its weight in turn."""
    return torch.softmax(inputs @ parameters.view(-1, inputs.shape[1]).T, dim=1)


def softmax_losses(inputs: Tensor, labels: Tensor, parameters: Tensor) -> Tensor:
    """Cross-entropy of each example [n]."""
    return -softmax_probabilities(inputs, parameters).gather(1, labels[:, None]).log()[:, 0]


def softmax_gradients(inputs: Tensor, labels: Tensor, parameters: Tensor) -> Tensor:
    """Gradient (p_i − e_{y_i}) ⊗ x_i of each example's loss, without the decay [n, c · d]."""
    p = softmax_probabilities(inputs, parameters)
    errors = p - torch.nn.functional.one_hot(labels, p.shape[1])
    return (errors[:, :, None] * inputs[:, None, :]).flatten(1)


def softmax_hessian(inputs: Tensor, parameters: Tensor, decay: float) -> Tensor:
    """Hessian of the mean loss and the decay [c · d, c · d]."""
    p = softmax_probabilities(inputs, parameters)
    n, c = p.shape
    blocks = [[(inputs.T * (p[:, a] * (float(a == b) - p[:, b]))) @ inputs / n for b in range(c)] for a in range(c)]
    hessian = torch.cat([torch.cat(row, dim=1) for row in blocks])
    return hessian + decay * torch.eye(len(hessian)).double()


def softmax_example_hessians(inputs: Tensor, parameters: Tensor) -> Tensor:
    """Hessian (diag(p_i) − p_i p_iᵀ) ⊗ x_i x_iᵀ of each example's loss [n, c · d, c · d]."""
    return torch.stack([softmax_hessian(row[None], parameters, 0.0) for row in inputs])


def fit_softmax(inputs: Tensor, labels: Tensor, classes: int, decay: float, start: Tensor | None = None) -> Tensor:
    """Minimiser by Newton's method [classes · d]."""
    theta = torch.zeros(classes * inputs.shape[1], dtype=torch.float64) if start is None else start
    for _ in range(50):
        slope = softmax_gradients(inputs, labels, theta).mean(dim=0) + decay * theta
        if slope.abs().max() < 1e-12:
            break
        theta = theta - torch.linalg.solve(softmax_hessian(inputs, theta, decay), slope)
    return theta


# Gradients of single examples by one backward pass each


def example_gradients(parameters: Mapping[str, Tensor], loss_of: Callable[[int], Tensor], n: int) -> dict[str, Tensor]:
    """Gradient of ``loss_of(k)``, the loss of example k alone, by each parameter: name -> [n, *parameter.shape]."""
    trainable = {name: parameter.requires_grad for name, parameter in parameters.items()}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    rows = []
    for k in range(n):
        found = torch.autograd.grad(loss_of(k), list(parameters.values()), allow_unused=True, materialize_grads=True)
        rows.append([gradient.detach() for gradient in found])
    for name, parameter in parameters.items():
        parameter.requires_grad_(trainable[name])
    return {name: torch.stack([row[j] for row in rows]) for j, name in enumerate(parameters)}


# Curvature of one layer, dense ([MS] section 3.3): G = E[vec(g) vec(g)ᵀ], vec row by row


def layer_factors(
    module: torch.nn.Module, loss_of: Callable[[int], Tensor], n: int, inputs_of: Callable[[Tensor], Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """Inputs [t, i] and output gradients [t, o] of one layer for each example alone, by one backward pass each.

    ``inputs_of`` brings what the layer saw to [1, t, i], with a column of ones for a bias.
    """
    factors, seen = [], []
    hook = module.register_forward_hook(lambda module, args, output: seen.append((args[0].detach(), output)))
    for k in range(n):
        seen.clear()
        loss = loss_of(k)
        [(inputs, output)] = seen
        [gradient] = torch.autograd.grad(loss, [output])
        gradient = gradient.flatten(2).mT if isinstance(module, torch.nn.Conv2d) else gradient
        rows = inputs_of(inputs)[0]
        factors.append((rows, gradient.reshape(len(rows), -1)))
    hook.remove()
    return factors


def second_moments(factors: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, float]:
    """A = E[a aᵀ] and S = E[s sᵀ] over the positions of all examples, and the mean number of positions."""
    inputs, gradients = (torch.cat(parts) for parts in zip(*factors, strict=True))
    count = len(inputs)
    return inputs.T @ inputs / count, gradients.T @ gradients / count, count / len(factors)


def kfac(factors: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """S ⊗ A times the mean number of positions."""
    a, s, positions = second_moments(factors)
    return positions * torch.kron(s, a)


def ekfac(factors: Sequence[tuple[Tensor, Tensor]], gradients: Tensor) -> Tensor:
    """The eigenbasis of S ⊗ A with E[(Q_Sᵀ g Q_A)²] of the example gradients [n, o, i] on the diagonal."""
    a, s, _ = second_moments(factors)
    left, right = torch.linalg.eigh(s).eigenvectors, torch.linalg.eigh(a).eigenvectors
    spectrum = torch.stack([(left.T @ g @ right) ** 2 for g in gradients]).mean(0)
    basis = torch.kron(left, right)
    return basis @ torch.diag(spectrum.flatten()) @ basis.T


def fisher(gradients: Tensor) -> Tensor:
    """E[g gᵀ] of example gradients [n, P], one outer product at a time."""
    return torch.stack([torch.outer(g, g) for g in gradients]).mean(0)


def damped_inverse(matrix: Tensor, damping: float | None = None, share: float = 0.1) -> Tensor:
    """Inverse with an absolute damping, or one that is a share of the mean eigenvalue."""
    extra = share * float(matrix.trace()) / len(matrix) if damping is None else damping
    return torch.linalg.inv(matrix + extra * torch.eye(len(matrix)).double())


def first_above(probabilities: Tensor, draw: float) -> int:
    """The category that a uniform number falls into, from the cumulative distribution."""
    total = 0.0
    for category, probability in enumerate(probabilities.tolist()):
        total += probability
        if draw < total:
            return category
    return len(probabilities) - 1


def open_rows(picks: list[int], complete: list[set[int]]) -> list[int]:
    """Rows that can be picked next so that one of the complete selections is still within reach."""
    within = [whole - set(picks) for whole in complete if whole >= set(picks)]
    return sorted(set().union(*within))


def greedy_within(
    score: Callable[[list[int], int], float],
    ids: Sequence[int | str],
    complete: list[set[int]],
    first: list[int],
    rounding: float = 0,
) -> list[int]:
    """Greedy on the smallest score(picks, row), ties by id, among what leaves a complete selection within reach."""
    picks = list(first)
    while left := open_rows(picks, complete):
        outcome = {row: score(picks, row) for row in left}
        best = min(outcome.values()) + rounding
        picks.append(min((row for row in left if outcome[row] <= best), key=lambda row: ids[row]))
    return picks
