"""Which estimate knows what happens when a group of training examples is left out? ([IA] section 4)

    python examples/leave_group_out.py [--quick] [--data DIR] [--pairs mnist-logistic concrete-mlp] [--workers 2]

Models are trained again without a group of alike examples (an anchor and its nearest neighbours in the space of the
model's outputs), over several seeds; Spearman's correlation over groups of what that does to the loss of held-out
examples with what each method predicts, for three sizes of groups. Pairs: logistic regression and an MLP on MNIST, an
MLP on FashionMNIST, on Concrete and on Parkinsons, as far as DIR (LI_DATA unless given) has mnist/, fashion_mnist/
(idx files) and uci_regression/concrete/data.txt, parkinsons_updrs.csv; without DIR the digits of scikit-learn.

Logistic regression is solved exactly, with and without the group, and its estimates use the dense Gauss-Newton matrix,
which is its Hessian. MLPs are trained by SGD as in [IA] (rate 0.01, weight decay 0.01, batch 64, 200 epochs; fewer
rows, smaller images); their estimates use the Fisher matrix of all parameters, or EK-FAC (--curvature ekfac), whose
blocks do not always leave the Newton step a positive definite rest. The weight decay is the damping. TracIn sums over 5
checkpoints of an SGD run, TRAK projects to at most 512 dimensions; of their sums and of gradient dot products only the
order has a meaning. Trainings are kept in --out: a run that was killed goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from group_pairs import DECAY, Pair, Training, found_pairs, load_pair
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_influence import (
    EKFAC,
    TRAK,
    ExampleLoss,
    FactoredProjection,
    GradientDot,
    GroupChanges,
    GroupEffects,
    GroupInfluence,
    Retraining,
    TargetMatrix,
    TargetRows,
    agreement_gain,
    leave_group_out,
    neighbour_groups,
)
from lightning_influence.evaluation.text_table import aligned, number

METHODS = ("F", "F+I", "F+B", "F+I+B", "N", "N+I")
BEST = "N+I"
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
    hessian = gram(rows) / len(inputs) + DECAY * torch.eye(r).double()
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
    return found


def curvature_rows(inputs: Tensor, p: Tensor) -> Tensor:
    """[n, classes, r] with Σ_s r_s r_s^T = (diag p - p p^T) ⊗ x x^T: row s is √p_s (e_s - p) ⊗ x."""
    roots = p.sqrt()[:, :, None] * (torch.eye(p.shape[1]).double() - p[:, None, :])
    return torch.einsum("nso,ni->nsoi", roots, inputs).flatten(2)


def gram(rows: Tensor) -> Tensor:
    flat = rows.flatten(0, 1)
    return flat.mT @ flat


def network_effects(pair: Pair, model: nn.Module) -> GroupEffects:
    """MLPs in all parameters at once, through the n x n products of gradients; the Fisher is that of drawn labels.

    Groups take their H_S from the same gradients as H, so that what is left stays positive definite. Blocks of layers
    that are inverted apart, as EK-FAC has them, do not warrant that.
    """
    rows = network_rows(pair, model, pair.inputs, DRAWS).double()
    flat, n = rows.flatten(0, 1), len(rows)
    inner = torch.linalg.cholesky(flat @ flat.mT + n * DECAY * torch.eye(len(flat)).double())

    def solve(vectors: Tensor) -> Tensor:
        """(G + λ)^-1 v = (v - R^T (n λ + R R^T)^-1 R v) / λ."""
        return (vectors - torch.cholesky_solve(flat @ vectors.mT, inner).mT @ flat) / DECAY

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

    found = torch.func.vmap(torch.func.grad(loss), (None, 0, 0), chunk_size=256)(parameters, inputs, labels)
    return torch.cat([part.flatten(1) for part in found.values()], 1)


def network_rows(pair: Pair, model: nn.Module, inputs: Tensor, draws: int) -> Tensor:
    """[n, draws, r]: gradients under labels drawn from the model, their outer products adding up to the Fisher."""
    generator = torch.Generator().manual_seed(len(inputs))
    with torch.no_grad():
        outputs = model(inputs)
    if pair.outputs > 1:
        drawn = torch.multinomial(outputs.softmax(1), draws, True, generator=generator)
    else:  # a residual of 1 gives the Gauss-Newton matrix itself, nothing is drawn
        drawn, draws = outputs[:, None] + 1, 1
    rows = [example_gradients(pair, model, inputs, drawn[:, k]) for k in range(draws)]
    return torch.stack(rows, 1) / draws**0.5


def ekfac_effects(pair: Pair, model: nn.Module) -> GroupInfluence:
    """EK-FAC with the weight decay as its damping, and the exact Gauss-Newton matrix of the target."""
    kind = "sampled" if pair.outputs > 1 else "gauss-newton"  # one output: exact at the same price
    influence = GroupInfluence(
        model, EKFAC(damping=DECAY), "gauss-newton", group_curvature=kind, batch_size=256, progress=False
    )
    return influence.fit(*datasets(pair))


def datasets(pair: Pair) -> tuple[TensorDataset, TensorDataset]:
    return TensorDataset(pair.inputs, pair.labels), TensorDataset(pair.target_inputs, pair.target_labels)


def additive_scores(pair: Pair, model: nn.Module, path: list[nn.Module], rate: float) -> dict[str, Tensor]:
    """Scores [n] of the mean target loss; their sum over a group estimates what removing it adds to the loss."""
    train, targets = datasets(pair)
    dots = [
        GradientDot(m.float(), batch_size=256, progress=False).score(targets, train, aggregate="mean").values[0]
        for m in (model, *path)
    ]
    return {
        "TracIn": rate * torch.stack(dots[1:]).sum(0),
        "TRAK": trak(pair, model.float(), train, targets),
        "gradient dot": dots[0],
    }


def trak(pair: Pair, model: nn.Module, train: TensorDataset, targets: TensorDataset) -> Tensor:
    """Scores of a query's output, weighed by what its output lacks: to first order they are scores of its loss."""
    size = min(512, len(train) // 4)
    loss = None if pair.outputs > 1 else Prediction()
    found = TRAK(model, FactoredProjection(size), loss, batch_size=256, progress=False, damping_share=1e-3).fit(train)
    scores = found.score(targets).total()
    with torch.no_grad():
        outputs = model(pair.target_inputs)
    if pair.outputs > 1:
        lacking = 1 - outputs.softmax(1).gather(1, pair.target_labels[:, None])
    else:
        lacking = pair.target_labels - outputs
    return (lacking * scores).mean(0)


def estimates(effects: GroupEffects | GroupInfluence, scores: dict[str, Tensor], groups: Groups) -> dict[str, Tensor]:
    """Predicted change of the target loss by every method, [g]; a method that refuses says why and is left out."""
    found: dict[str, Tensor] = {}
    for method in METHODS:
        try:
            found[method] = effects.estimates(groups, method, "removal")
        except ValueError as error:  # the Newton step needs a positive definite rest
            print(f"  {method} is not defined here: {error}")
    for name, values in scores.items():
        found[name] = torch.stack([values[list(map(int, group))].sum() for group in groups])
    return found


def study(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """All sizes of one pair: a dict for each size and method."""
    pair = load_pair(name, args.data, args.rows, args.targets, args.pixels, args.seed)
    training = Training(pair, args.epochs, args.rate)
    everyone, start = tuple(range(len(pair.labels))), time.perf_counter()
    path = training.sgd(everyone, 0, checkpoints=5)
    model = training.exact(everyone) if pair.logistic else path[-1]
    network = ekfac_effects if args.curvature == "ekfac" else network_effects
    effects = dense_effects(pair, model) if pair.logistic else network(pair, model)
    scores = additive_scores(pair, training.exact(everyone) if pair.logistic else model, path, args.rate)
    places = probabilities(model, pair.inputs) if pair.outputs > 1 else model(pair.inputs).detach()
    print(
        f"\n{name}: {len(everyone)} rows, {sum(p.numel() for p in model.parameters())} parameters, target loss "
        f"{pair.target_loss(model):.4f}; ready after {time.perf_counter() - start:.0f} s",
        flush=True,
    )
    retraining = Retraining(
        training,
        path=args.out / f"{name}.jsonl",
        settings=settings(name, args),
        workers=args.workers,
        progress=sys.stderr.isatty(),
    )
    results = []
    for share in args.sizes:
        groups = neighbour_groups(places, round(share * len(everyone)), args.groups, seed=args.seed)
        changes = leave_group_out(retraining, groups, everyone, 1 if pair.logistic else args.seeds)
        results += lines(name, changes, estimates(effects, scores, groups))
    return results


def settings(name: str, args: argparse.Namespace) -> dict[str, Any]:
    keys = ("rows", "targets", "pixels", "epochs", "rate", "seed")
    return {"pair": name, **{key: getattr(args, key) for key in keys}}


def lines(name: str, changes: GroupChanges, found: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Printed, and as dicts."""
    report, size = changes.agreement(found), len(changes.groups[0])
    error, distinct = changes.standard_error.mean().item(), len(set(map(frozenset, changes.groups)))
    print(
        f"  groups of {size}, {distinct} distinct: mean change {changes.mean.mean():.4f}, spread "
        f"{changes.mean.std():.4f}, standard error {error:.4f}, reliability {changes.reliability:.2f}",
        flush=True,
    )
    results = []
    for line in report.lines:
        gain: tuple[float | None, Any] = (None, None)
        if BEST in found and line.name != BEST:
            gain = agreement_gain(found[BEST], found[line.name], changes.mean)
        row = {"pair": name, "size": size, "method": line.name, **line.to_dict(), "behind": gain[0], "by": gain[1]}
        results.append({key: value for key, value in row.items() if key != "name"} | {"cases": report.cases})
    print(
        aligned(
            [
                ["  method", "spearman", "kendall", "mean absolute error", f"{BEST} is better by"],
                *(["  " + row["method"], *measured(row)] for row in results),
            ]
        ),
        flush=True,
    )
    return results


def measured(row: dict[str, Any]) -> list[str]:
    cells = [number(row[key], (row[f"{key}_low"], row[f"{key}_high"])) for key in ("spearman", "kendall", "mae")]
    return [*cells, number(row["behind"], row["by"])]


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few rows, groups and epochs: under a minute on digits")
    parser.add_argument("--data", type=Path, default=os.environ.get("LI_DATA"), help="folder with the data sets")
    parser.add_argument("--pairs", nargs="+", help="names; all whose data is there")
    parser.add_argument("--rows", type=int, help="training rows; 1000, or 300")
    parser.add_argument("--targets", type=int, help="held-out rows; 500, or 200")
    parser.add_argument("--pixels", type=int, default=14, help="side of MNIST's images, averages below 28")
    parser.add_argument("--curvature", choices=("fisher", "ekfac"), default="fisher", help="of the MLPs")
    parser.add_argument("--groups", type=int, help="of each size; 50, or 10")
    parser.add_argument(
        "--sizes", type=float, nargs="+", default=[0.025, 0.08, 0.2], help="of groups, share of the rows"
    )
    parser.add_argument("--seeds", type=int, help="trainings for each group of an MLP; 3, or 1")
    parser.add_argument("--epochs", type=int, help="of SGD; 200 as in [IA], or 40")
    parser.add_argument("--rate", type=float, help="of SGD; 0.01 as in [IA], or 0.1")
    parser.add_argument("--seed", type=int, default=0, help="of the split and of the anchors")
    parser.add_argument("--workers", type=int, default=1, help="processes that train at a time")
    parser.add_argument("--out", type=Path, default=Path("runs/leave_group_out"), help="folder for what was trained")
    args = parser.parse_args(arguments)
    defaults: dict[str, tuple[float, float]] = {"rate": (0.01, 0.1)}
    defaults |= {"rows": (1000, 300), "targets": (500, 200), "groups": (50, 10), "seeds": (3, 1), "epochs": (200, 40)}
    for key, values in defaults.items():
        if getattr(args, key) is None:
            setattr(args, key, values[args.quick])
    known = found_pairs(args.data)
    if not set(args.pairs or known) <= set(known) or not known:
        parser.error(f"expected --pairs among those whose data is there, {known}; for others give --data DIR")
    if not all(0 < share < 1 for share in args.sizes) or args.rows * min(args.sizes) < 1:
        parser.error("expected --sizes as shares of the rows, such as 0.05, and a row in each group")
    args.pairs = args.pairs or known
    return args


def main(arguments: list[str]) -> None:
    args = parse(arguments)
    torch.set_num_threads(1)  # such small matrices are faster so
    warnings.filterwarnings("ignore", ".*too few positions")  # fewer rows than pixels: the damping makes up for it
    results = [line for name in args.pairs for line in study(name, args)]
    (args.out / "results.json").write_text(json.dumps(results, indent=1))
    kept = ("pair", "size", "method", "spearman", "spearman_low", "spearman_high", "cases")
    print("\nRESULT " + json.dumps([{key: row[key] for key in kept} for row in results]))


if __name__ == "__main__":
    main(sys.argv[1:])
