"""EK-FAC fit and pairwise scoring against kronfluence, on the same model and sequences in one process.

    python examples/benchmarks/ekfac.py [--quick] [--sequences 500] [--repeats 3]
    python examples/benchmarks/ekfac.py --model smollm2 --text FILE [--random-weights]

neox: GPT-NeoX, 4 layers x 256, vocabulary 8000, 500 sequences of 128 random tokens; all linear layers of the blocks
(attention and MLP). smollm2: SmolLM2-135M-Instruct or its shape with random weights, its MLP layers, 64 sequences of
128 tokens of a text. 10 queries, labels sampled from the model, damping 0.1 x mean eigenvalue. The two take turns;
medians are printed, and both over a bare forward and backward pass of the same sequences with weight gradients. With
one thread the seconds are those of the processor, which others that use the machine do not add to. The scores are
compared where no chance is in them, with the empirical Fisher on both sides, on the first --compared sequences.
Peak memory is what a process that runs only one of them adds to what it held after its imports (Linux only); with
--device cuda that of the GPU.
`--rank 32` also times the scoring with queries of that rank on both sides.

Our fit is timed twice, with the same result: "fit" keeps the layers' inputs and gradients of the first pass in
temporary files of up to --disk GB for the second pass, "fit_again" makes them again (two whole passes, as kronfluence).

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

sys.path.append(str(Path(__file__).resolve().parent.parent))  # the other examples

from smollm2 import load_smollm2

from lightning_influence import EKFAC, InfluenceFunction, LanguageModelLoss

Fisher: TypeAlias = Literal["sampled", "empirical"]
COMPONENTS = {"neox": [r"layers\.\d+\.(attention|mlp)\."], "smollm2": [r"layers\.\d+\.mlp\."]}
TRACKED = {"neox": (".attention.", ".mlp."), "smollm2": (".mlp.",)}
SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}


class Sequences(Dataset[dict[str, Tensor]]):
    """Rows [n, t] of tokens, every one of them a target."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, k: int) -> dict[str, Tensor]:
        row = self.tokens[k]
        return {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row}


def build(args: argparse.Namespace) -> tuple[nn.Module, Sequences, Sequences]:
    """The model, what it is fitted on, and queries."""
    torch.manual_seed(0)
    model, words = (neox if args.model == "neox" else smollm2)(args)
    tokens = torch.tensor(words[: (args.sequences + args.queries) * args.length]).reshape(-1, args.length)
    if len(tokens) < args.sequences + args.queries:
        raise ValueError(
            f"expected a --text of {args.sequences + args.queries} sequences of {args.length} tokens, it has "
            f"{len(tokens)}. Lower --sequences."
        )
    return model.to(args.device), Sequences(tokens[args.queries :]), Sequences(tokens[: args.queries])


def drawn(args: argparse.Namespace, vocabulary: int) -> list[int]:
    """Random tokens."""
    n = (args.sequences + args.queries) * args.length
    return torch.randint(0, vocabulary, (n,), generator=torch.Generator().manual_seed(1)).tolist()


def neox(args: argparse.Namespace) -> tuple[nn.Module, list[int]]:
    config = GPTNeoXConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=2,
        intermediate_size=4 * args.width,
        max_position_embeddings=args.length,
        use_cache=False,
    )
    return GPTNeoXForCausalLM(config).eval(), drawn(args, args.vocabulary)


def smollm2(args: argparse.Namespace) -> tuple[nn.Module, list[int]]:
    if args.random_weights:
        config = LlamaConfig(**SMOLLM2, max_position_embeddings=args.length, use_cache=False)
        return LlamaForCausalLM(config).eval(), drawn(args, config.vocab_size)
    model, tokenizer = load_smollm2(args.cache)
    text = args.text.read_text(encoding="utf-8")[: 12 * (args.sequences + args.queries) * args.length]
    return model, tokenizer(text, verbose=False).input_ids


def timed(work: Callable[[], object]) -> tuple[float, Any]:
    on_gpu = torch.cuda.is_initialized()
    clock = time.process_time if torch.get_num_threads() == 1 and not on_gpu else time.perf_counter
    start = clock()
    result = work()
    if on_gpu:
        torch.cuda.synchronize()
    return clock() - start, result


def bare(model: nn.Module, data: Sequences, queries: Sequences, args: argparse.Namespace) -> None:
    """The floor: forward and backward with weight gradients."""
    for k in range(0, len(data), args.batch):
        tokens = data.tokens[k : k + args.batch].to(args.device)
        model(input_ids=tokens, labels=tokens).loss.backward()
        model.zero_grad(set_to_none=True)


@dataclass
class Found:
    """Seconds of each part, and the scores [q, n]."""

    scores: Tensor
    seconds: dict[str, float]


def ours(
    model: nn.Module, data: Sequences, queries: Sequences, args: argparse.Namespace, fisher: Fisher = "sampled"
) -> Found:
    curvature = EKFAC(fisher=fisher)
    given: dict[str, Any] = {"components": COMPONENTS[args.model], "batch_size": args.batch, "progress": False}

    def fit(disk: int) -> object:
        return curvature.fit(model, data, LanguageModelLoss(), disk_budget=disk, **given)

    seconds = {"fit": timed(lambda: fit(int(1e9 * args.disk)))[0]}
    if fisher == "sampled" and not args.only and args.disk:
        seconds["fit_again"] = timed(lambda: fit(0))[0]
    # as kronfluence, which keeps the gradients of all queries at a time
    influence = InfluenceFunction(model, curvature, LanguageModelLoss(), memory_budget=int(1e9 * args.memory), **given)
    seconds["score"], scores = timed(lambda: influence.score(queries, data))
    if args.rank is not None:
        seconds["low_rank"] = timed(lambda: influence.score(queries, data, rank=args.rank))[0]
    return Found(scores.total().cpu(), seconds)


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


def rival(
    model: nn.Module, data: Sequences, queries: Sequences, args: argparse.Namespace, fisher: Fisher = "sampled"
) -> Found:
    """kronfluence 1.0.1 on a copy of the model, which it wraps in place."""
    linear = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    task = LanguageModeling([name for name in linear if any(part in name for part in TRACKED[args.model])])
    wrapped = prepare_model(copy.deepcopy(model), task)
    quiet: dict[str, Any] = {"cpu": args.device == "cpu", "disable_tqdm": True, "log_level": logging.ERROR}
    factors = FactorArguments(use_empirical_fisher=fisher == "empirical")
    with tempfile.TemporaryDirectory() as folder:
        analyzer = Analyzer("bench", wrapped, task, output_dir=folder, **quiet)

        def score(name: str, rank: int | None) -> object:
            own = ScoreArguments(damping_factor=None, query_gradient_low_rank=rank)  # 0.1 x mean eigenvalue, as ours
            return analyzer.compute_pairwise_scores(
                name, "f", queries, data, len(queries), per_device_train_batch_size=args.batch, score_args=own
            )

        seconds = {"fit": timed(lambda: analyzer.fit_all_factors("f", data, args.batch, factor_args=factors))[0]}
        seconds["score"] = timed(lambda: score("s", None))[0]
        if args.rank is not None:
            seconds["low_rank"] = timed(lambda: score("low", args.rank))[0]
        return Found(analyzer.load_pairwise_scores("s")["all_modules"].cpu(), seconds)


def agreement(model: nn.Module, data: Sequences, queries: Sequences, args: argparse.Namespace) -> dict[str, float]:
    """Of the scores under the empirical Fisher, on the first sequences."""
    some = Sequences(data.tokens[: args.compared])
    left, right = (work(model, some, queries, args, "empirical").scores.double() for work in (ours, rival))
    rows = zip(left.tolist(), right.tolist(), strict=True)
    spearman = statistics.mean(float(spearmanr(a, b).statistic) for a, b in rows)
    return {"spearman": spearman, "score_error": float((left - right).norm() / right.norm())}


def peak_memory(which: str, args: argparse.Namespace) -> float:
    """What the work adds to a process that only runs one of them, in MiB."""
    names = (
        "device",
        "model",
        "sequences",
        "queries",
        "batch",
        "disk",
        "memory",
        "width",
        "layers",
        "vocabulary",
        "length",
        "cache",
        "text",
    )
    given = [f"--{name}={getattr(args, name)}" for name in names if getattr(args, name) is not None]
    flags = ["--random-weights"] * args.random_weights
    command = [sys.executable, __file__, f"--only={which}", *given, *flags]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(out.strip().splitlines()[-1])


def resident(field: str) -> float:
    """``VmRSS`` (now) or ``VmHWM`` (highest so far) of this process, in MiB."""
    status = Path("/proc/self/status").read_text()
    return float(next(line.split()[1] for line in status.splitlines() if line.startswith(field))) / 1024


def added_memory(work: Callable[[], object]) -> float:
    """Peak over ``work`` above what was held before: the importing of libraries peaks higher than the work does."""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - held) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="32 sequences (8 of smollm2), two rounds")
    parser.add_argument("--model", choices=sorted(COMPONENTS), default="neox")
    parser.add_argument("--random-weights", action="store_true", help="the shape of smollm2, and random tokens")
    parser.add_argument("--text", type=Path, help="file whose beginning smollm2 is fitted on")
    parser.add_argument("--cache", type=Path, default=Path("runs/models"), help="folder for the weights of smollm2")
    parser.add_argument("--sequences", type=int, help="500, or 64 of smollm2")
    parser.add_argument("--compared", type=int, default=64, help="sequences of the comparison of scores, 0 for none")
    parser.add_argument("--queries", type=int, default=10)
    parser.add_argument("--batch", type=int, help="sequences of a batch: 16, or 4 of smollm2")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rank", type=int, help="of the queries, for low-rank scoring beside the exact one")
    parser.add_argument("--disk", type=float, default=16, help="GB for files between the passes of our fit, 0 for none")
    parser.add_argument("--memory", type=float, default=8, help="GB for the gradients of queries in our scoring")
    parser.add_argument("--width", type=int, default=256, help="of neox")
    parser.add_argument("--layers", type=int, default=4, help="of neox")
    parser.add_argument("--vocabulary", type=int, default=8000, help="of neox")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", choices=sorted(WORKS), help="run one, print its peak memory")
    args = parser.parse_args(arguments)
    small = args.model == "neox"
    if args.quick:
        args.sequences, args.repeats = 32 if small else 8, 2
    if args.sequences is None:
        args.sequences = 500 if small else 64
    if args.batch is None:
        args.batch = 16 if small else 4
    if not small and not args.random_weights and (args.text is None or not args.text.is_file()):
        parser.error(f"expected --text to be a file of text for smollm2, or --random-weights; got {args.text}")
    return args


def rounds(args: argparse.Namespace, model: nn.Module, data: Sequences, queries: Sequences) -> dict[str, float]:
    """Median seconds of each part."""
    times: dict[str, list[float]] = {}
    bare(model, Sequences(data.tokens[: args.batch]), queries, args)  # warm-up
    for turn in range(args.repeats):
        times.setdefault("bare", []).append(timed(lambda: bare(model, data, queries, args))[0])
        for name in ("ours", "rival") if turn % 2 == 0 else ("rival", "ours"):
            for part, seconds in WORKS[name](model, data, queries, args).seconds.items():
                times.setdefault(f"{name}_{part}", []).append(seconds)
        print({key: round(values[-1], 2) for key, values in times.items()}, flush=True)
    return {key: statistics.median(values) for key, values in times.items()}


WORKS: dict[str, Callable[..., Any]] = {"ours": ours, "rival": rival, "bare": bare}


def ratios(found: dict[str, float]) -> dict[str, float]:
    """What the RESULT line says of the times."""
    result = {f"{part}_ratio_kronfluence": found[f"ours_{part}"] / found[f"rival_{part}"] for part in ("fit", "score")}
    result |= {f"{part}_over_bare": found[f"ours_{part}"] / found["bare"] for part in ("fit", "score")}
    result |= {f"rival_{part}_over_bare": found[f"rival_{part}"] / found["bare"] for part in ("fit", "score")}
    if "ours_fit_again" in found:
        result["fit_again_ratio_kronfluence"] = found["ours_fit_again"] / found["rival_fit"]
        result["fit_again_over_bare"] = found["ours_fit_again"] / found["bare"]
    if "ours_low_rank" in found:
        result["low_rank_score_ratio_kronfluence"] = found["ours_low_rank"] / found["rival_low_rank"]
    return result


def main(arguments: list[str]) -> None:
    args = parse(arguments)
    warnings.filterwarnings("ignore")
    model, data, queries = build(args)
    if args.only:
        print(added_memory(lambda: WORKS[args.only](model, data, queries, args)))
        return
    found = rounds(args, model, data, queries)
    print("medians [s]:", {key: round(value, 2) for key, value in found.items()}, flush=True)
    result = ratios(found)
    memory = {key: peak_memory(key, args) for key in ("ours", "rival", "bare")}
    print("peak memory [MiB]:", {key: round(value) for key, value in memory.items()}, flush=True)
    result["peak_memory_ratio"] = memory["ours"] / memory["rival"]
    if args.compared:
        result |= agreement(model, data, queries, args)
    print("RESULT", json.dumps({key: float(f"{value:.6g}") for key, value in result.items()}))


if __name__ == "__main__":
    main(sys.argv[1:])
