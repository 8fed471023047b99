"""Inner products of every component's gradients for queries and their candidates, against bare passes and two rivals.

    python examples/benchmarks/component_dots.py [--quick] [--queries 40] [--pairs FILE] [--budget 8e9]

SmolLM2-135M's shape (211 components, tied embedding), queries with 5 candidates each. Without a file: random weights
and sequences of random tokens, the second half of each supervised, candidates next to the query's own source. With
``--pairs FILE`` (jsonl with instruction, input, output_a, output_b): the real model, answers of two writers as queries
and training examples, candidates by BM25.

Taken in turn, medians printed: a bare forward and backward pass with weight gradients of the distinct examples, sorted
by length (the floor), and ours. Beside them, on the first queries and scaled to all: the naive way, which takes the
gradients of each query and of each of its candidates one at a time, and kronfluence's per-module scores with the
identity, four queries and all of their candidates at a time. Peak memory is that of a process which runs only ours
(Linux), and what it may be is the model, the budget, and twice what a bare batch adds.

kronfluence is not a dependency: pip install --no-deps kronfluence accelerate einops einconv opt_einsum
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import random
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from padding import IGNORED, Row, batches, padded
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_influence import BM25Filter, GradientDot, LanguageModelLoss, find_components

sys.path.append(str(Path(__file__).resolve().parent.parent))

COMPONENTS = ["all-linear", "embedding"]


class Sequences(Dataset[Row]):
    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, k: int) -> Row:
        return self.rows[k]


@dataclass
class Problem:
    model: nn.Module
    queries: Sequences
    train: Sequences
    candidates: list[list[int]]
    args: argparse.Namespace

    @property
    def distinct(self) -> list[Row]:
        used = sorted({k for row in self.candidates for k in row})
        return [*self.queries.rows, *(self.train.rows[k] for k in used)]


# -- data


def sequence(prompt: list[int], answer: list[int]) -> Row:
    return {"input_ids": torch.tensor(prompt + answer), "labels": torch.tensor([IGNORED] * len(prompt) + answer)}


def random_problem(args: argparse.Namespace) -> Problem:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.width,
        intermediate_size=args.width * 8 // 3,
        num_hidden_layers=args.layers,
        num_attention_heads=args.width // 64,
        num_key_value_heads=args.width // 192 or 1,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
    )
    generator = random.Random(0)

    def rows() -> Sequences:
        lengths = [min(512, max(20, round(generator.lognormvariate(math.log(90), 0.45)))) for _ in range(args.queries)]
        tokens = [[generator.randrange(args.vocabulary) for _ in range(t)] for t in lengths]
        return Sequences([sequence(row[: len(row) // 2], row[len(row) // 2 :]) for row in tokens])

    def near(own: int) -> list[int]:
        found = {own}
        while len(found) < min(args.candidates, args.queries):
            found.add(round(generator.gauss(own, 6)) % args.queries)
        return sorted(found)

    return Problem(LlamaForCausalLM(config).eval(), rows(), rows(), [near(k) for k in range(args.queries)], args)


def real_problem(args: argparse.Namespace) -> Problem:
    from instruction_pool import InstructionRow, chat_tokens
    from smollm2 import load_smollm2

    model, tokenizer = load_smollm2(args.cache)
    sides: tuple[list[Row], list[Row]] = ([], [])
    texts: tuple[list[str], list[str]] = ([], [])
    for line in args.pairs.read_text().split("\n"):
        row = json.loads(line) if line else {}
        question = "\n".join(filter(None, (row.get("instruction"), row.get("input"))))
        both = (
            [sequence(*chat_tokens(InstructionRow("", "", question, row[f"output_{k}"]), tokenizer)) for k in "ba"]
            if row
            else []
        )
        if both and max(len(one["input_ids"]) for one in both) <= args.longest and len(sides[0]) < args.queries:
            for side, text, one, key in zip(sides, texts, both, "ba", strict=True):
                side.append(one)
                text.append(f"{question} {row[f'output_{key}']}")
    own = list(range(len(sides[0])))
    found = BM25Filter(texts[1]).candidates(texts[0], args.candidates, must_include=own)
    return Problem(model, Sequences(sides[0]), Sequences(sides[1]), found.tolist(), args)


# -- the work


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds, and processor seconds, which other processes on the machine disturb less."""
    start, used = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - start, time.process_time() - used


def bare(problem: Problem) -> None:
    for batch in batches(problem.distinct, problem.args.positions):
        problem.model(**batch, use_cache=False).loss.backward()
        problem.model.zero_grad(set_to_none=True)


def ours(problem: Problem) -> Any:
    args = problem.args
    estimator = GradientDot(
        problem.model, LanguageModelLoss(), COMPONENTS, memory_budget=int(args.budget), progress=False
    )
    sides = (DataLoader(data, collate_fn=padded) for data in (problem.queries, problem.train))
    return estimator.pairs(*sides, problem.candidates, batch_positions=args.positions)


def gradients(model: nn.Module, row: Row) -> list[Tensor]:
    batch = padded([row])
    logits = model(input_ids=batch["input_ids"], use_cache=False).logits[0, :-1]
    F.cross_entropy(logits, batch["labels"][0, 1:], ignore_index=IGNORED, reduction="sum").backward()
    parameters = dict(model.named_parameters())
    names = [c.parameters[0] for c in find_components(model, COMPONENTS)]
    found = [parameters[name].grad.flatten() for name in names]
    model.zero_grad(set_to_none=True)
    return found


def naive(problem: Problem, count: int) -> Tensor:
    """[c, pairs] for the first queries: a gradient is held while those of its candidates come by."""
    columns = []
    for query, row in enumerate(problem.candidates[:count]):
        left = gradients(problem.model, problem.queries[query])
        for k in row:
            right = gradients(problem.model, problem.train[k])
            columns.append(torch.stack([torch.dot(a, b) for a, b in zip(left, right, strict=True)]))
            [torch.dot(b, b) for b in right]
    return torch.stack(columns, dim=1)


def answers(model: nn.Module) -> Any:
    """kronfluence's view of the same losses, on every linear layer."""
    from kronfluence.task import Task

    class Answers(Task):
        def compute_train_loss(self, batch: Row, model: nn.Module, sample: bool = False) -> Tensor:
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
            labels = batch["labels"][:, 1:].flatten()
            return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels, ignore_index=IGNORED, reduction="sum")

        def compute_measurement(self, batch: Row, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self) -> list[str]:
            return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]

        def get_attention_mask(self, batch: Row) -> Tensor:
            return batch["attention_mask"]

    return Answers()


def kronfluence_scores(problem: Problem, count: int) -> float:
    """Seconds of per-module scores with the identity, for the first queries and all of their candidates."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.utils.dataset import DataLoaderKwargs

    task = answers(problem.model)
    queries = Sequences(problem.queries.rows[:count])
    train = Sequences([problem.train[k] for k in sorted({k for row in problem.candidates[:count] for k in row})])
    model = prepare_model(copy.deepcopy(problem.model), task)
    quiet: dict[str, Any] = {"cpu": True, "disable_tqdm": True, "log_level": logging.ERROR}
    apart = ScoreArguments(compute_per_module_scores=True)
    with tempfile.TemporaryDirectory() as folder:
        analyzer = Analyzer("dots", model, task, output_dir=folder, **quiet)
        analyzer.set_dataloader_kwargs(DataLoaderKwargs(collate_fn=padded))
        analyzer.fit_all_factors("f", train, 4, factor_args=FactorArguments(strategy="identity"))
        seconds, _ = timed(
            lambda: analyzer.compute_pairwise_scores(
                "s", "f", queries, train, count, per_device_train_batch_size=8, score_args=apart
            )
        )
        return seconds


# -- memory


def resident(field: str) -> float:
    status = Path("/proc/self/status").read_text()
    return float(next(line.split()[1] for line in status.splitlines() if line.startswith(field))) / 1024


def added_memory(work: Callable[[], object]) -> float:
    """Peak above what was held before, in MiB."""
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before


def memory_of(which: str) -> float:
    command = [sys.executable, __file__, *sys.argv[1:], f"--only={which}"]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(out.strip().splitlines()[-1])


def longest_batch(problem: Problem) -> None:
    """One bare batch, the largest."""
    sizes = [(batch["input_ids"].numel(), batch) for batch in batches(problem.distinct, problem.args.positions)]
    problem.model(**max(sizes, key=lambda pair: pair[0])[1], use_cache=False).loss.backward()
    problem.model.zero_grad(set_to_none=True)


# -- the comparison


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model, within a minute")
    parser.add_argument("--queries", type=int, default=40)
    parser.add_argument("--candidates", type=int, default=5)
    parser.add_argument("--pairs", type=Path, help="jsonl of real pairs, with the real model")
    parser.add_argument("--longest", type=int, default=250, help="tokens; longer pairs of the file are left out")
    parser.add_argument("--cache", type=Path, default=Path("runs/models"), help="weights of the real model")
    parser.add_argument("--budget", type=float, default=8e9, help="bytes of gradients that are kept")
    parser.add_argument("--positions", type=int, default=1024, help="of a batch, padding included")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rivals", type=int, default=4, help="queries that the rivals are timed on; 0 for none")
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--only", choices=["ours", "batch"], help="run one, print its peak memory")
    args = parser.parse_args()
    if args.quick:
        args.width, args.layers, args.vocabulary, args.repeats = 192, 6, 4096, 2
    return args


def errors(problem: Problem, dots: Any) -> dict[str, float]:
    """Largest error of the first query's products in float32, relative to the gradients' lengths, against float64."""
    single = naive(problem, 1)
    problem.model.double()
    truth = naive(problem, 1)
    problem.model.float()
    count = truth.shape[1]
    rows, columns = dots.pairs[:count].T
    lengths = (dots.query_squares[:, rows] * dots.train_squares[:, columns]).sqrt()
    found = {"ours": dots.dots[:, :count], "naive": single}
    return {key: float(((value - truth).abs() / lengths).max()) for key, value in found.items()}


def rounds(problem: Problem) -> tuple[dict[str, float], dict[str, float], Any]:
    """Median seconds and processor seconds of both, in turns, and what ours found."""
    times: dict[str, list[tuple[float, float]]] = {"bare": [], "ours": []}
    found: list[Any] = []
    works = {"bare": lambda: bare(problem), "ours": lambda: found.append(ours(problem))}
    longest_batch(problem)  # warm-up
    for turn in range(problem.args.repeats):
        for name in ("bare", "ours") if turn % 2 == 0 else ("ours", "bare"):
            times[name].append(timed(works[name]))
        print({key: [round(value, 1) for value in values[-1]] for key, values in times.items()}, flush=True)
    wall, used = ({key: statistics.median(v[k] for v in values) for key, values in times.items()} for k in (0, 1))
    return wall, used, found[0]


def rivals(problem: Problem) -> dict[str, float]:
    """Seconds for all queries, from the first few: both take each query for itself."""
    count = problem.args.rivals
    scale = len(problem.queries) / count
    slow = {"naive": timed(lambda: naive(problem, count))[0], "kronfluence": kronfluence_scores(problem, count)}
    print(f"rivals on {count} of {len(problem.queries)} queries [s]:", {k: round(v, 1) for k, v in slow.items()})
    return {key: scale * value for key, value in slow.items()}


def main() -> None:
    args = arguments()
    warnings.filterwarnings("ignore")
    problem = real_problem(args) if args.pairs else random_problem(args)
    if args.only:
        print(added_memory(lambda: (ours if args.only == "ours" else longest_batch)(problem)))
        return
    lengths = [len(row["input_ids"]) for row in problem.distinct]
    mean = statistics.mean(lengths)
    print(f"{len(lengths)} distinct examples, mean {mean:.0f} tokens, {torch.get_num_threads()} threads")
    wall, used, dots = rounds(problem)
    result = {"ratio_bare": wall["ours"] / wall["bare"], "ratio_bare_cpu": used["ours"] / used["bare"]}
    if args.rivals:
        result |= {f"ratio_{key}": wall["ours"] / value for key, value in rivals(problem).items()}
    print("largest error in float32:", {key: f"{value:.1e}" for key, value in errors(problem, dots).items()})
    model = sum(p.nbytes for p in problem.model.parameters()) / 2**20
    allowed = model + args.budget / 2**20 + 2 * memory_of("batch")
    result |= {"peak_mb": model + memory_of("ours"), "allowed_mb": allowed}
    print("medians [s]:", {key: round(value, 2) for key, value in wall.items()})
    print("RESULT", json.dumps({key: round(value, 4) for key, value in result.items()}))


if __name__ == "__main__":
    main()
