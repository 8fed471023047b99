"""How near is each estimator to conjugate gradients, and what does it cost? Table 1 of [MS] in kind.

    python examples/benchmarks/influence_table.py [--quick] [--data DIR] [--device cuda] [--rows 500]

GPT-NeoX, 4 layers x 256, 2 heads, trained on Penn Treebank (DIR/ptb/ptb.train.txt and ptb.valid.txt; DIR is LI_DATA
unless given) or on sentences made on the spot; 10 queries from the held-out text, 500 training sequences as
candidates. The curvature is that of the first --curvature-rows of the candidates: the time of CG, LiSSA
and Arnoldi is proportional to that number. Scored are the linear layers of the blocks (attention and MLP). All methods
with a damping get the same absolute one, a share of the mean eigenvalue of the whole matrix, so that they solve one
problem; EK-FAC by itself would damp each layer by its own mean.

Agreement is Spearman's correlation with the scores of CG over the candidates, mean over the queries, as in [MS]: read
the table with the residual that CG got to. Overhead is what is done once whatever the queries are, pairwise what
10 x 500 scores take after that, solving included; with one thread in seconds of the processor, which others that use
the machine do not add to. Of solvers the steps and the largest residual, over the length of the gradient, are printed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_model, save_model
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import GPTNeoXForCausalLM

sys.path.append(str(Path(__file__).resolve().parent.parent))  # the other examples

from tiny_text import Words, lines_of, made_sentences, neox_config

from lightning_influence import CKA, EKFAC, TRAK, Curvature, FactoredProjection, GradientDot, InfluenceFunction, Scores
from lightning_influence.curvature import CG, Arnoldi, Diagonal, LiSSA

BLOCKS = [r"layers\.\d+\.(attention|mlp)\."]
MLP = [r"layers\.\d+\.mlp\."]
REFERENCE = "CG"


class Sequences(Dataset[dict[str, Tensor]]):
    """Rows [n, t] of tokens, every one of them a target."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, k: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[k], "labels": self.tokens[k]}


@dataclass
class Line:
    """One method's line of the table."""

    method: str
    scores: Tensor
    overhead_s: float
    pairwise_s: float
    notes: dict[str, Any] = field(default_factory=dict)


def texts(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Training text and held-out text."""
    if args.data is not None:
        return lines_of(args.data / "ptb" / "ptb.train.txt"), lines_of(args.data / "ptb" / "ptb.valid.txt")
    made = [text for text, _ in made_sentences(args.sentences, args.seed)]
    return made[len(made) // 10 :], made[: len(made) // 10]


def trained(model: nn.Module, tokens: Tensor, args: argparse.Namespace) -> None:
    """Train it, or take the weights of an earlier run with the same sizes, steps and seed."""
    names = ("width", "layers", "vocabulary", "length", "steps", "rate", "batch", "seed")
    made = {name: str(getattr(args, name)) for name in names} | {"tokens": str(tokens.sum().item())}
    if args.weights is not None and args.weights.exists():
        with safe_open(args.weights, "pt") as file:
            known = file.metadata()
        odd = sorted(name for name in made if known.get(name) != made[name])
        if odd:
            raise ValueError(f"{args.weights}: weights of another run, which differs in {odd}. Remove the file.")
        load_model(model, args.weights)
        model.to(args.device).eval()
        return
    print(f"loss of a token {train(model, tokens, args):.3f} after {args.steps} steps", flush=True)
    if args.weights is not None:
        save_model(model, str(args.weights), metadata=made)


def train(model: nn.Module, tokens: Tensor, args: argparse.Namespace) -> float:
    """Mean loss of a token in the last tenth of the steps."""
    order = torch.Generator().manual_seed(args.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.rate)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / args.steps)
    losses = []
    model.train()
    for _ in range(args.steps):
        rows = tokens[torch.randint(len(tokens), (args.batch,), generator=order)].to(args.device)
        loss = model(input_ids=rows, labels=rows).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
        losses.append(float(loss.detach()))
    model.eval().zero_grad()
    return statistics.mean(losses[-max(1, args.steps // 10) :])


class Table:
    """All methods on one model, the same queries and the same candidates."""

    def __init__(self, model: nn.Module, queries: Sequences, rows: Sequences, args: argparse.Namespace) -> None:
        self.model, self.queries, self.rows, self.args = model, queries, rows, args
        self.fitted_on = Sequences(rows.tokens[: args.curvature_rows])
        self.options = {"batch_size": args.batch, "progress": False}
        # The mean of E[g_k²] over all parameters k is the mean eigenvalue of the Fisher.
        options = {"components": BLOCKS, "batch_size": args.batch, "progress": False}
        whole = Diagonal(seed=args.seed).fit(model, self.fitted_on, **options)
        sizes = sum(c.numel for c in whole.components)
        trace = sum(float(values.double().sum()) for name, values in whole.state().items())
        self.damping = args.damping_share * trace / sizes

    def lines(self) -> Iterator[Line]:
        """The reference first; then from the cheapest to the most expensive."""
        args, damped = self.args, {"damping": self.damping, "seed": self.args.seed}
        exact = {"tolerance": args.tolerance, "max_steps": args.max_steps}
        yield self.influence(REFERENCE, CG(**damped, **exact))
        ekfac = EKFAC(**damped)
        yield (own := self.influence("EK-FAC", ekfac))
        yield self.influence("EK-FAC, MLP only", EKFAC(**damped), components=MLP)
        yield self.plain("GDP", GradientDot(self.model, None, BLOCKS, **self.options))
        yield self.plain("CKA", CKA(self.model, None, BLOCKS, **self.options))
        yield self.trak()
        few = {"tolerance": args.tolerance, "max_steps": args.few}
        yield self.influence(
            "CG, EK-FAC-preconditioned", CG(**damped, **few, preconditioner=ekfac), before=own.overhead_s
        )
        yield self.influence("CG, as few steps", CG(**damped, **few))
        yield self.influence("Arnoldi", Arnoldi(**damped, rank=args.rank, steps=3 * args.rank))
        yield self.influence("LiSSA", LiSSA(**damped, depth=args.patience, tolerance=args.tolerance))

    def influence(self, method: str, curvature: Curvature, components: list[str] = BLOCKS, before: float = 0.0) -> Line:
        """With a curvature; what it says about convergence becomes a note. ``before``: seconds of a preconditioner."""
        estimator = InfluenceFunction(self.model, curvature, components=components, **self.options)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*converged")
            overhead, _ = timed(lambda: estimator.fit(self.fitted_on))
            pairwise, scores = timed(lambda: estimator.score(self.queries, self.rows))
        notes: dict[str, Any] = {}
        if history := getattr(curvature, "history", None):
            notes = {"steps": int(history[-1].steps.max()), "residual": float(history[-1].residuals[-1].max())}
        return Line(method, scores.total().cpu(), before + overhead, pairwise, notes)

    def plain(self, method: str, estimator: GradientDot | CKA) -> Line:
        """What needs no fit."""
        pairwise, scores = timed(lambda: estimator.score(self.queries, self.rows))
        return Line(method, scores.total().cpu(), 0.0, pairwise)

    def trak(self) -> Line:
        """One model; as many dimensions as half of the candidates, which they have to span."""
        projection = FactoredProjection(len(self.rows) // 2, seed=self.args.seed)
        estimator = TRAK(self.model, projection, components=BLOCKS, **self.options)
        overhead, _ = timed(lambda: estimator.fit(self.rows))
        pairwise, scores = timed(lambda: estimator.score(self.queries))
        return Line("TRAK", scores.total().cpu(), overhead, pairwise, {"dimensions": len(self.rows) // 2})


def timed(work: Callable[[], Any]) -> tuple[float, Scores]:
    """Seconds, with one thread those of the processor, and what came of it; a GPU is waited for."""
    alone = torch.get_num_threads() == 1 and not torch.cuda.is_available()
    clock = time.process_time if alone else time.perf_counter
    start = clock()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - start, result


def agreement(scores: Tensor, reference: Tensor) -> float:
    """Spearman's correlation over the candidates, mean over the queries."""
    rows = zip(scores.tolist(), reference.tolist(), strict=True)
    return statistics.mean(float(spearmanr(a, b).statistic) for a, b in rows)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given = os.environ.get("LI_DATA")
    parser.add_argument("--data", type=Path, default=Path(given) if given else None, help="folder that has ptb/")
    parser.add_argument("--quick", action="store_true", help="made text and a tiny model, within a minute")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--queries", type=int, default=10)
    parser.add_argument("--rows", type=int, default=500, help="candidates")
    parser.add_argument("--curvature-rows", type=int, help="of the candidates, that the curvature is of; default 32")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=8000)
    parser.add_argument("--length", type=int, default=32, help="tokens of a sequence")
    parser.add_argument("--sentences", type=int, default=20000, help="that are made where there is no data")
    parser.add_argument("--steps", type=int, default=2000, help="of the training")
    parser.add_argument("--rate", type=float, default=1e-3, help="first learning rate of the training")
    parser.add_argument("--weights", type=Path, help="file for the trained weights, read where it exists")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--damping-share", type=float, default=100.0, help="of the mean eigenvalue")
    parser.add_argument(
        "--tolerance", type=float, default=1e-2, help="of the residuals, over the length of the gradient"
    )
    parser.add_argument("--max-steps", type=int, default=60, help="of CG")
    parser.add_argument("--patience", type=int, default=20, help="steps of LiSSA")
    parser.add_argument("--few", type=int, default=10, help="steps of preconditioned CG")
    parser.add_argument("--rank", type=int, default=8, help="eigenpairs of Arnoldi, in a space of three times that")
    parser.add_argument("--seed", type=int, default=0)
    return _checked(parser, parser.parse_args(arguments))


def _checked(parser: argparse.ArgumentParser, args: argparse.Namespace) -> argparse.Namespace:
    if args.quick:
        args.data, args.sentences, args.vocabulary, args.length = None, 600, 200, 12
        args.width, args.layers, args.steps, args.batch = 16, 2, 150, 16
        args.queries, args.rows, args.max_steps, args.few, args.rank, args.patience = 4, 48, 100, 5, 6, 25
        args.damping_share = 1.0
    if args.curvature_rows is None:
        args.curvature_rows = min(32, args.rows)
    if args.data is not None and not (args.data / "ptb").is_dir():
        parser.error(f"expected --data to be a folder with ptb/ptb.train.txt, {args.data} has no ptb")
    if min(args.queries, args.steps, args.few, args.rank, args.max_steps, args.patience) < 1:
        parser.error("expected --queries, --steps, --few, --rank, --max-steps and --patience >= 1")
    if args.rows < 8 * args.layers:
        parser.error(
            f"expected --rows >= {8 * args.layers}: TRAK has half as many dimensions, one a linear layer at least"
        )
    if not 1 <= args.curvature_rows <= args.rows:
        parser.error("expected --curvature-rows from 1 to --rows")
    return args


def build(args: argparse.Namespace) -> Table:
    """Train the model; draw queries from the held-out text and candidates from the training text."""
    learned, held_out = texts(args)
    words = Words(learned, args.vocabulary)
    rows, others = words.windows(learned, args.length), words.windows(held_out, args.length)
    if len(rows) < args.rows or len(others) < args.queries:
        raise ValueError(
            f"expected {args.rows} sequences to train on and {args.queries} others, the text has {len(rows)} and "
            f"{len(others)} of {args.length} tokens."
        )
    torch.manual_seed(args.seed)
    model = GPTNeoXForCausalLM(neox_config(len(words), args.width, args.layers, args.length)).to(args.device)
    source = "Penn Treebank" if args.data is not None else "made sentences"
    print(f"{source}: {rows.numel()} tokens, {len(words)} words", flush=True)
    trained(model, rows, args)
    draw = torch.Generator().manual_seed(args.seed)
    candidates = rows[torch.randperm(len(rows), generator=draw)[: args.rows]]
    queries = others[torch.randperm(len(others), generator=draw)[: args.queries]]
    return Table(model, Sequences(queries), Sequences(candidates), args)


def main(arguments: list[str]) -> None:
    args = parse(arguments)
    table = build(args)
    print(f"{args.queries} queries x {args.rows} candidates, {args.length} tokens each; damping {table.damping:.4g}")
    print(f"{'method':<28}{'spearman':>9}{'overhead [s]':>14}{'pairwise [s]':>14}", flush=True)
    found: dict[str, Any] = {}
    reference: Tensor | None = None
    for line in table.lines():
        reference = line.scores if reference is None else reference
        own = agreement(line.scores, reference)
        notes = ", ".join(f"{key} {value:.3g}" for key, value in line.notes.items())
        print(f"{line.method:<28}{own:>9.3f}{line.overhead_s:>14.3f}{line.pairwise_s:>14.3f}  {notes}", flush=True)
        numbers = {"spearman": own, "overhead_s": line.overhead_s, "pairwise_s": line.pairwise_s, **line.notes}
        found[line.method] = {key: float(f"{value:.4g}") for key, value in numbers.items()}
    print("RESULT", json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
