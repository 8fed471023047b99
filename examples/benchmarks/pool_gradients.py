"""Projected gradients of a pool, written to a file: against bare passes, and against LESS's way.

    python examples/benchmarks/pool_gradients.py [--quick] [--rows 16] [--dimensions 8192] [--repeats 3]
        [--device cuda] [--random-weights]

SmolLM2-135M-Instruct (its shape with --random-weights, a small model with --quick), sequences of random tokens (mean
100) of which the second half is supervised. Taken in turn, medians printed; with one thread the seconds are those of
the processor, which others that use the machine do not add to:

* all linear layers: a bare forward and backward pass with weight gradients, and ours, `ProjectedDot(LoGra).write`, in
  batches of the same size, float16 on disk;
* LoRA on the attention layers, which is LESS's recipe: ours, and LESS's way on the first few rows, scaled to all: one
  example at a time, its gradient by a backward pass, projected by traker's BasicProjector (Rademacher) to as many
  dimensions. On a GPU too, where LESS has traker's CudaProjector, which this does not measure.

traker and peft are not dependencies: pip install traker peft
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from devices import clock, runs_on
from padding import IGNORED, Row, batches, padded
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.data import DataLoader
from trak.projectors import BasicProjector, ProjectionType
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_influence import LanguageModelLoss, LoGra, ProjectedDot

sys.path.append(str(Path(__file__).resolve().parent.parent))  # the other examples

from smollm2 import load_smollm2

SHAPE = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
VOCABULARY = 4096  # tokens that are drawn; the real model has more


def model_of(args: argparse.Namespace) -> nn.Module:
    """The real model, or one of its kind with random weights."""
    torch.manual_seed(0)
    if not args.quick:
        own = LlamaForCausalLM(LlamaConfig(**SHAPE)) if args.random_weights else load_smollm2(args.cache)[0]
        return own.eval().to(args.device)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=3,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
    )
    return LlamaForCausalLM(config).eval().to(args.device)


def rows_of(args: argparse.Namespace) -> list[Row]:
    generator = random.Random(0)
    rows = []
    for _ in range(args.rows):
        length = min(512, max(20, round(generator.lognormvariate(math.log(90), 0.45))))
        tokens = torch.tensor([generator.randrange(VOCABULARY) for _ in range(length)])
        labels = tokens.clone()
        labels[: length // 2] = IGNORED
        rows.append({"input_ids": tokens, "labels": labels})
    return rows


def moved(batch: Row, args: argparse.Namespace) -> Row:
    return {key: value.to(args.device) for key, value in batch.items()}


def bare(model: nn.Module, rows: list[Row], args: argparse.Namespace) -> None:
    for batch in batches(rows, args.positions):
        model(**moved(batch, args), use_cache=False).loss.backward()
        model.zero_grad(set_to_none=True)


def ours(model: nn.Module, components: str, rows: list[Row], args: argparse.Namespace) -> int:
    """Bytes of the file."""
    estimator = ProjectedDot(
        model, LoGra(args.dimensions), LanguageModelLoss(), components, normalise=True, progress=False
    )
    data = DataLoader(rows, batch_size=len(rows), collate_fn=padded)  # the positions bound a batch
    with tempfile.TemporaryDirectory() as folder:
        matrix = estimator.write(data, Path(folder) / "pool.npy", batch_positions=args.positions)
        assert bool((matrix.values.float().norm(dim=1) - 1).abs().max() < 1e-2)
        return matrix.path.stat().st_size


def less(model: nn.Module, rows: list[Row], args: argparse.Namespace) -> None:
    """One example at a time, as in the original code but for its device."""
    trained = [p for p in model.parameters() if p.requires_grad]
    numel = sum(p.numel() for p in trained)
    projector = BasicProjector(numel, args.dimensions, 0, ProjectionType.rademacher, args.device, 16)
    for row in rows:
        model(**moved(padded([row]), args), use_cache=False).loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in trained if p.grad is not None])
        model.zero_grad(set_to_none=True)
        projector.project(gradient[None], model_id=0)


def timed(work: Callable[[], object], device: torch.device) -> float:
    start = clock(device)
    work()
    return clock(device) - start


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model, within a minute")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--dimensions", type=int, default=8192)
    parser.add_argument("--positions", type=int, default=1024, help="of a batch, padding included")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--less-rows", type=int, default=1, help="that LESS's way is timed on")
    parser.add_argument("--rank", type=int, default=8, help="of LoRA")
    parser.add_argument("--device", type=runs_on, default="cpu", help="cpu or cuda")
    parser.add_argument("--random-weights", action="store_true", help="SmolLM2's shape, without its weights")
    parser.add_argument("--cache", type=Path, default=Path("runs/models"), help="weights of the real model")
    args = parser.parse_args()
    if args.quick:
        args.dimensions, args.rows = 1024, 24
    return args


def main() -> None:
    args = arguments()
    warnings.filterwarnings("ignore")
    rows = rows_of(args)
    model, adapted = model_of(args), model_of(args)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    adapted = get_peft_model(adapted, LoraConfig(r=args.rank, lora_alpha=4 * args.rank, target_modules=targets))
    sizes: list[int] = []
    works: dict[str, Callable[[], object]] = {
        "bare": lambda: bare(model, rows, args),
        "ours": lambda: sizes.append(ours(model, "all-linear", rows, args)),
        "ours, LoRA": lambda: ours(adapted, "lora", rows, args),
        "LESS's way": lambda: less(adapted, rows[: args.less_rows], args),
    }
    tokens = sum(len(row["input_ids"]) for row in rows)
    print(f"{args.rows} rows, {tokens / args.rows:.0f} tokens each; {args.device}, {torch.get_num_threads()} threads")
    for name in works if args.device.type == "cuda" else ["ours, LoRA"]:  # warm-up: a GPU loads its kernels
        works[name]()
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(args.repeats):
        for name in list(works)[:: 1 if turn % 2 == 0 else -1]:
            times[name].append(timed(works[name], args.device))
        print({name: round(values[-1], 2) for name, values in times.items()}, flush=True)
    seconds = {name: statistics.median(values) for name, values in times.items()}
    seconds["LESS's way"] *= args.rows / args.less_rows
    print(f"medians [s], LESS's way scaled from {args.less_rows} rows:", {k: round(v, 2) for k, v in seconds.items()})
    result = {
        "ratio_bare": seconds["ours"] / seconds["bare"],
        "speedup_less": seconds["LESS's way"] / seconds["ours, LoRA"],
        "bytes_per_number": sizes[0] / args.rows / args.dimensions,
    }
    print("RESULT", json.dumps({key: round(value, 4) for key, value in result.items()}))


if __name__ == "__main__":
    main()
