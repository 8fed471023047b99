"""Which estimate knows what happens when a group of training examples is left out? ([IA] section 4)

    python examples/leave_group_out.py [--quick] [--data DIR] [--pairs mnist-logistic concrete-mlp] [--splits 3]

Models are trained again without a group of alike examples (an anchor and its nearest neighbours in the space of the
model's outputs); Spearman's correlation over groups of what that does to the loss of held-out examples with what each
method predicts, for three sizes of groups and several splits of the data, each with anchors of its own. Pairs: logistic
regression on MNIST and FashionMNIST, an MLP on both, on Concrete and on Parkinsons, ResNet-9 on CIFAR-10, as far as DIR
(LI_DATA unless given) has mnist/, fashion_mnist/ (idx files), uci_regression/concrete/data.txt, parkinsons_updrs.csv
and cifar-10-batches-bin/ (CIFAR-10 in its binary version); without DIR the digits of scikit-learn.

Logistic regression is solved exactly, with and without the group, and its estimates use the dense Gauss-Newton matrix,
which is its Hessian. How MLPs are trained decides what can be seen at all:

- converged (the default): a small network with tanh, to its minimum by L-BFGS, and without a group on from there, which
  is what influence is about: how one minimum moves. Estimates use the Hessian of regression, the Fisher matrix of all
  parameters for classes. Of --seeds initial weights both, what happens and what is predicted, are averaged;
- sgd, as in [IA] (ReLU, rate 0.01, weight decay 0.01, batch 64, 200 epochs): every training ends elsewhere, and the
  effect of a group is small beside that of the seed; "reliability" tells how much so.

ResNet-9 is always trained by SGD, with momentum 0.9, a cosine and a quarter of the epochs, and with GroupNorm, so that
every example has a loss of its own. "converged" is then a fifth of these epochs more, from the network that all rows
give, with all rows and without the group; the damping of its estimates, which use EK-FAC, adds what so short a training
amounts to. "sgd" trains it from the start each time. On a GPU (--device cuda) a few --workers share it.

--curvature takes another one: ekfac, which has the groups' curvature in its own eigenbasis only, or fisher for
ResNet-9. The weight decay is the damping. TracIn sums over 5 checkpoints of an SGD run, TRAK projects to at most 512
dimensions; of their sums and of gradient dot products only the order has a meaning. Trainings are kept in --out: a run
that was killed goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from group_estimates import (
    Groups,
    additive_scores,
    dense_effects,
    ekfac_effects,
    estimates,
    hessian_effects,
    network_effects,
    probabilities,
)
from group_pairs import DECAY, Training, found_pairs, load_pair
from torch import Tensor, nn

from lightning_influence import GroupChanges, Retraining, agreement_gain, leave_group_out, neighbour_groups
from lightning_influence.evaluation.text_table import aligned, number

BEST = "N+I"
EFFECTS = {"hessian": hessian_effects, "fisher": network_effects, "ekfac": ekfac_effects, "exact": dense_effects}


def study(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """All splits and sizes of one pair: a dict for each of them and method."""
    return [line for seed in range(args.seed, args.seed + args.splits) for line in study_split(name, args, seed)]


def study_split(name: str, args: argparse.Namespace, seed: int) -> list[dict[str, Any]]:
    logistic, residual, start = name.endswith("logistic"), name.endswith("resnet9"), time.perf_counter()
    smooth = args.training == "converged" and not logistic and not residual
    own = {"smooth": smooth, "decay": DECAY if logistic or residual else args.decay, "width": args.width}
    pair = load_pair(name, args.data, args.rows, args.targets, args.pixels, seed, **own)
    epochs = max(1, args.epochs // 4) if residual else args.epochs
    device = args.device if residual else "cpu"
    further = max(1, epochs // 5) if residual and args.training == "converged" else 0
    training, everyone = Training(pair, epochs, args.rate, device, further), tuple(range(len(pair.labels)))
    model = training.network(everyone, 0)
    places = probabilities(model, pair.inputs) if pair.outputs > 1 else outputs(model, pair.inputs)
    sizes = [round(share * len(everyone)) for share in args.sizes]
    groups = {size: neighbour_groups(places, size, args.groups, seed=seed) for size in sizes}
    seeds = 1 if logistic else args.seeds
    predicted = averages([predictions(training, groups, k, args) for k in range(seeds if smooth or further else 1)])
    print(
        f"\n{name}, split {seed}: {len(everyone)} rows, {sum(p.numel() for p in model.parameters())} parameters, "
        f"target loss {pair.target_loss(model):.4f}; estimates after {time.perf_counter() - start:.0f} s",
        flush=True,
    )
    retraining = Retraining(
        training,
        path=args.out / f"{name}-{seed}.jsonl",
        settings=settings(name, args, training, seed),
        workers=args.workers,
        progress=sys.stderr.isatty(),
    )
    results = []
    for size in sizes:
        changes = leave_group_out(retraining, groups[size], everyone, seeds)
        results += lines({"pair": name, "split": seed, "size": size}, changes, predicted[size])
    return results


def predictions(
    training: Training, groups: dict[int, Groups], seed: int, args: argparse.Namespace
) -> dict[int, dict[str, Tensor]]:
    """Of every method for the groups of every size, from the network of one seed."""
    pair, everyone = training.pair, tuple(range(len(training.pair.labels)))
    model, path = training.network(everyone, seed), training.sgd(everyone, seed, checkpoints=5)
    kind = "exact" if pair.logistic else args.curvature
    if kind is None:
        kind = "ekfac" if pair.residual else "hessian" if pair.smooth and pair.outputs == 1 else "fisher"
    effects = EFFECTS[kind](replace(pair, decay=training.damping), model)
    scores = additive_scores(pair, model, path, training.mean_rates(5))
    return {size: estimates(effects, scores, of_size) for size, of_size in groups.items()}


def averages(found: list[dict[int, dict[str, Tensor]]]) -> dict[int, dict[str, Tensor]]:
    """Over networks, of the methods that no network refuses."""
    return {
        size: {
            method: torch.stack([of[size][method].double() for of in found]).mean(0)
            for method in first
            if all(method in of[size] for of in found)
        }
        for size, first in found[0].items()
    }


@torch.no_grad()
def outputs(model: nn.Module, inputs: Tensor) -> Tensor:
    found: Tensor = model(inputs.to(next(model.parameters())))
    return found.cpu()


def settings(name: str, args: argparse.Namespace, training: Training, seed: int) -> dict[str, Any]:
    keys, pair = ("rows", "targets", "pixels", "epochs", "rate"), training.pair
    return {
        "pair": name,
        **{key: getattr(args, key) for key in keys},
        "seed": seed,
        "smooth": pair.smooth,
        "decay": pair.decay,
        **({"width": pair.width, "further": training.further} if pair.residual else {}),
    }


def lines(case: dict[str, Any], changes: GroupChanges, found: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Printed, and as dicts."""
    report = changes.agreement(found)
    error, distinct = changes.standard_error.mean().item(), len(set(map(frozenset, changes.groups)))
    print(
        f"  groups of {case['size']}, {distinct} distinct: mean change {changes.mean.mean():.4f}, spread "
        f"{changes.mean.std():.4f}, standard error {error:.4f}, reliability {changes.reliability:.2f}",
        flush=True,
    )
    results = []
    for line in report.lines:
        gain: tuple[float | None, Any] = (None, None)
        if BEST in found and line.name != BEST:
            gain = agreement_gain(found[BEST], found[line.name], changes.mean)
        row = {**case, "method": line.name, **line.to_dict(), "behind": gain[0], "by": gain[1]}
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


def summary(results: list[dict[str, Any]]) -> str:
    """Mean Spearman over the splits, with the least and the most; and where the claims of [IA] and ours fail."""
    methods = list(dict.fromkeys(row["method"] for row in results))
    table, missed = [["pair", "rows", *methods]], []
    for pair, size in dict.fromkeys((row["pair"], row["size"]) for row in results):
        found = {method: [] for method in methods}
        for row in results:
            if (row["pair"], row["size"]) == (pair, size):
                found[row["method"]].append(row["spearman"])
        means = {method: statistics.mean(values) for method, values in found.items() if values}
        cells = [number(means[m], (min(found[m]), max(found[m]))) if m in means else "" for m in methods]
        table.append([pair, str(size), *cells])
        claims = [("F+I", other) for other in ("F", "F+B", "TRAK", "TracIn")]
        claims += [(BEST, other) for other in methods if other != BEST]
        failed = [f"{a} <= {b}" for a, b in claims if a in means and b in means and means[a] <= means[b]]
        missed += [f"  {pair}, groups of {size}: {', '.join(failed)}"] if failed else []
    return "\n".join([aligned(table), "not as claimed:", *(missed or ["  nothing"])])


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="few rows, groups and epochs, no ResNet-9 unless named: a minute"
    )
    parser.add_argument("--data", type=Path, default=os.environ.get("LI_DATA"), help="folder with the data sets")
    parser.add_argument("--pairs", nargs="+", help="names; all whose data is there")
    parser.add_argument("--rows", type=int, help="training rows; 1000, or 300")
    parser.add_argument("--targets", type=int, help="held-out rows; 500, or 200")
    parser.add_argument("--pixels", type=int, default=14, help="side of MNIST's images, averages below 28")
    parser.add_argument("--training", choices=("converged", "sgd"), default="converged", help="of the MLPs")
    parser.add_argument("--decay", type=float, help="of the MLPs' weights; 0.03, or 0.01 as in [IA] with sgd")
    parser.add_argument("--curvature", choices=("hessian", "fisher", "ekfac"), help="of the networks")
    parser.add_argument("--width", type=int, help="channels of ResNet-9's first layer; 16, or 8 (usual: 64)")
    parser.add_argument("--groups", type=int, help="of each size; 50, or 10")
    parser.add_argument(
        "--sizes", type=float, nargs="+", default=[0.025, 0.08, 0.2], help="of groups, share of the rows"
    )
    parser.add_argument("--seeds", type=int, help="initial weights, or SGD runs, of an MLP; 3, or 1")
    parser.add_argument("--epochs", type=int, help="of SGD; 200 as in [IA], or 40; of ResNet-9 a quarter")
    parser.add_argument("--rate", type=float, help="of SGD; 0.01 as in [IA], or 0.1")
    parser.add_argument("--seed", type=int, default=0, help="of the first split and its anchors")
    parser.add_argument("--splits", type=int, default=1, help="of the data, with other anchors")
    parser.add_argument("--workers", type=int, default=1, help="processes that train at a time")
    parser.add_argument("--device", default="cpu", help="where ResNet-9 is trained and scored, such as cuda")
    parser.add_argument("--out", type=Path, default=Path("runs/leave_group_out"), help="folder for what was trained")
    args = parser.parse_args(arguments)
    defaults: dict[str, tuple[float, float]] = {"rate": (0.01, 0.1)}
    defaults |= {"rows": (1000, 300), "targets": (500, 200), "groups": (50, 10), "seeds": (3, 1), "epochs": (200, 40)}
    defaults["width"] = (16, 8)
    for key, values in defaults.items():
        if getattr(args, key) is None:
            setattr(args, key, values[args.quick])
    if args.decay is None:
        args.decay = DECAY if args.training == "sgd" else 0.03
    _check(parser, args)
    return args


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    known = found_pairs(args.data)
    if not set(args.pairs or known) <= set(known) or not known:
        parser.error(f"expected --pairs among those whose data is there, {known}; for others give --data DIR")
    if not all(0 < share < 1 for share in args.sizes) or args.rows * min(args.sizes) < 1:
        parser.error("expected --sizes as shares of the rows, such as 0.05, and a row in each group")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"expected --device to be one that this machine has, such as cpu; got {args.device} ({error})")
    args.pairs = args.pairs or [name for name in known if not (args.quick and name.endswith("resnet9"))]
    if args.curvature == "hessian" and any(name.endswith("resnet9") for name in args.pairs):
        parser.error("expected --curvature fisher or ekfac for ResNet-9, whose Hessian is too large to be written down")


def main(arguments: list[str]) -> None:
    args = parse(arguments)
    torch.set_num_threads(1)  # such small matrices are faster so
    warnings.filterwarnings("ignore", ".*too few positions")  # fewer rows than pixels: the damping makes up for it
    results = [line for name in args.pairs for line in study(name, args)]
    (args.out / "results.json").write_text(json.dumps(results, indent=1))
    print("\nSpearman's correlation, mean over splits (least to most)\n" + summary(results))
    kept = ("pair", "split", "size", "method", "spearman", "spearman_low", "spearman_high", "cases")
    print("\nRESULT " + json.dumps([{key: row[key] for key in kept} for row in results]))


if __name__ == "__main__":
    main(sys.argv[1:])
