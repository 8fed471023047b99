"""EK-FAC fit and pairwise scoring against kronfluence, on the same model and sequences in one process.

    python examples/benchmarks/ekfac.py [--quick] [--sequences 500] [--repeats 3]

GPT-NeoX, 4 layers x 256, vocabulary 8000, sequences of 128 random tokens, 10 queries; all linear layers of the
blocks (attention and MLP), labels sampled from the model, damping 0.1 x mean eigenvalue. The two take turns;
medians are printed, and both over a bare forward and backward pass of the same sequences with weight gradients.
Peak memory is what a process that runs only one of them adds to what it held after its imports (Linux only).

kronfluence is not a dependency: pip install --no-deps kronfluence accelerate einops einconv opt_einsum
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from lightning_influence import EKFAC, InfluenceFunction, LanguageModelLoss

COMPONENTS = [r"layers\.\d+\.(attention|mlp)\."]


class Sequences(Dataset[dict[str, Tensor]]):
    """Random tokens, every one of them a target."""

    def __init__(self, n: int, vocabulary: int, length: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.tokens = torch.randint(0, vocabulary, (n, length), generator=generator)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, k: int) -> dict[str, Tensor]:
        row = self.tokens[k]
        return {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row}


def build(args: argparse.Namespace) -> tuple[nn.Module, Sequences, Sequences]:
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=2,
        intermediate_size=4 * args.width,
        max_position_embeddings=args.length,
        use_cache=False,
    )
    model = GPTNeoXForCausalLM(config).eval()
    data = Sequences(args.sequences, args.vocabulary, args.length, 1)
    return model, data, Sequences(args.queries, args.vocabulary, args.length, 2)


def timed(work: Callable[[], object]) -> tuple[float, object]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def bare(model: nn.Module, data: Sequences, queries: Sequences, batch: int) -> None:
    """The floor: forward and backward with weight gradients."""
    for k in range(0, len(data), batch):
        tokens = data.tokens[k : k + batch]
        model(input_ids=tokens, labels=tokens).loss.backward()
        model.zero_grad(set_to_none=True)


def ours(model: nn.Module, data: Sequences, queries: Sequences, batch: int) -> tuple[float, float, Tensor]:
    influence = InfluenceFunction(model, EKFAC(), LanguageModelLoss(), COMPONENTS, batch_size=batch, progress=False)
    fit, _ = timed(lambda: influence.fit(data))
    score, scores = timed(lambda: influence.score(queries, data))
    return fit, score, scores.total()


class LanguageModeling(Task):
    """kronfluence's view of the same losses; labels sampled as its examples do it."""

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def compute_train_loss(self, batch: dict[str, Tensor], model: nn.Module, sample: bool = False) -> Tensor:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        logits = logits[:, :-1].reshape(-1, logits.size(-1)).float()
        labels = batch["labels"][:, 1:].reshape(-1)
        if sample:
            with torch.no_grad():
                probabilities = torch.softmax(logits.detach(), dim=-1)
                labels = torch.multinomial(probabilities, num_samples=1).flatten()
        return F.cross_entropy(logits, labels, reduction="sum")

    def compute_measurement(self, batch: dict[str, Tensor], model: nn.Module) -> Tensor:
        return self.compute_train_loss(batch, model)

    def get_influence_tracked_modules(self) -> list[str]:
        return self.names

    def get_attention_mask(self, batch: dict[str, Tensor]) -> Tensor:
        return batch["attention_mask"]


def rival(model: nn.Module, data: Sequences, queries: Sequences, batch: int) -> tuple[float, float, Tensor]:
    """kronfluence 1.0.1 on a copy of the model, which it wraps in place."""
    linear = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    task = LanguageModeling([name for name in linear if ".attention." in name or ".mlp." in name])
    wrapped = prepare_model(copy.deepcopy(model), task)
    quiet: dict[str, Any] = {"cpu": True, "disable_tqdm": True, "log_level": logging.ERROR}
    damping = ScoreArguments(damping_factor=None)  # 0.1 x mean eigenvalue, as ours
    with tempfile.TemporaryDirectory() as folder:
        analyzer = Analyzer("bench", wrapped, task, output_dir=folder, **quiet)
        fit, _ = timed(lambda: analyzer.fit_all_factors("f", data, batch, factor_args=FactorArguments()))
        score, _ = timed(
            lambda: analyzer.compute_pairwise_scores(
                "s", "f", queries, data, len(queries), per_device_train_batch_size=batch, score_args=damping
            )
        )
        scores = analyzer.load_pairwise_scores("s")
    return fit, score, scores["all_modules"]


def peak_memory(which: str, args: argparse.Namespace) -> float:
    """What the work adds to the resident set of a process that only runs one of them, in MiB."""
    sizes = [
        f"--{key}={getattr(args, key)}" for key in ("sequences", "batch", "width", "layers", "vocabulary", "length")
    ]
    command = [sys.executable, __file__, f"--only={which}", *sizes]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(out.strip().splitlines()[-1])


def resident(field: str) -> float:
    """``VmRSS`` (now) or ``VmHWM`` (highest so far) of this process, in MiB."""
    status = Path("/proc/self/status").read_text()
    return float(next(line.split()[1] for line in status.splitlines() if line.startswith(field))) / 1024


def added_memory(work: Callable[[], object]) -> float:
    """Peak over ``work`` above what was held before: the importing of libraries peaks higher than the work does."""
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="32 sequences, two rounds, within a minute")
    parser.add_argument("--sequences", type=int, default=500)
    parser.add_argument("--queries", type=int, default=10)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=8000)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--only", choices=["ours", "rival", "bare"], help="run one, print its peak memory")
    args = parser.parse_args()
    if args.quick:
        args.sequences, args.repeats = 32, 2
    return args


def rounds(args: argparse.Namespace, model: nn.Module, data: Sequences, queries: Sequences) -> dict[str, float]:
    """Median seconds of each part, and how well the scores agree (labels are sampled independently)."""
    times: dict[str, list[float]] = {}
    agreement = []
    bare(model, Sequences(args.batch, args.vocabulary, args.length, 3), queries, args.batch)  # warm-up
    for turn in range(args.repeats):
        times.setdefault("bare", []).append(timed(lambda: bare(model, data, queries, args.batch))[0])
        scores = {}
        for name in ("ours", "rival") if turn % 2 == 0 else ("rival", "ours"):
            fit, score, scores[name] = WORKS[name](model, data, queries, args.batch)
            times.setdefault(f"{name}_fit", []).append(fit)
            times.setdefault(f"{name}_score", []).append(score)
        rows = zip(scores["ours"].tolist(), scores["rival"].tolist(), strict=True)
        agreement.append(statistics.mean(spearmanr(a, b).statistic for a, b in rows))
        print({key: round(values[-1], 2) for key, values in times.items()}, flush=True)
    return {key: statistics.median(values) for key, values in times.items()} | {"spearman": statistics.mean(agreement)}


WORKS: dict[str, Callable[..., Any]] = {"ours": ours, "rival": rival, "bare": bare}


def main() -> None:
    args = arguments()
    warnings.filterwarnings("ignore")
    model, data, queries = build(args)
    if args.only:
        print(added_memory(lambda: WORKS[args.only](model, data, queries, args.batch)))
        return
    found = rounds(args, model, data, queries)
    memory = {key: peak_memory(key, args) for key in ("ours", "rival", "bare")}
    print("medians [s]:", {key: round(value, 2) for key, value in found.items() if key != "spearman"})
    print("peak memory [MiB]:", {key: round(value) for key, value in memory.items()})
    result = {
        "fit_ratio_kronfluence": found["ours_fit"] / found["rival_fit"],
        "score_ratio_kronfluence": found["ours_score"] / found["rival_score"],
        "fit_over_bare": found["ours_fit"] / found["bare"],
        "score_over_bare": found["ours_score"] / found["bare"],
        "rival_fit_over_bare": found["rival_fit"] / found["bare"],
        "rival_score_over_bare": found["rival_score"] / found["bare"],
        "peak_memory_ratio": memory["ours"] / memory["rival"],
        "spearman": found["spearman"],
    }
    print("RESULT", json.dumps({key: round(value, 4) for key, value in result.items()}))


if __name__ == "__main__":
    main()
