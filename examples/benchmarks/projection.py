"""Projection of per-example gradients to 8192 dimensions: FactoredProjection against traker's BasicProjector.

    python examples/benchmarks/projection.py [--quick] [--examples 8] [--repeats 3]

Records of a randomly initialised Llama of the shape of SmolLM2-135M (30 layers, 576 wide, vocabulary 49152, tied
embeddings: 211 weight matrices), sequences of 100 random tokens; dimensions are shared out over the matrices in
proportion to their size. Both get the same records of one batch, take turns, and draw their random numbers anew in
every round; medians are printed, and seconds that include the forward and backward pass. traker draws its matrices
for every batch as it cannot hold them, so that a larger batch helps it: "without drawing" leaves that time out.

Errors are those of inner products, (<p_i, p_j> - <g_i, g_j>) / (|g_i| |g_j|), over all pairs of the batch, all rounds
and all matrices, each multiplied by the root of the matrix's dimensions so that all count; and of whole gradients.

traker is not a dependency: pip install traker
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from trak.projectors import BasicProjector
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_influence import Component, GradientCapture, LanguageModelLoss, LayerRecord
from lightning_influence.projections import FactoredProjection, Projection, TrakProjection

WEIGHTS = ["_proj$", "embed_tokens"]
Records = list[tuple[Component, LayerRecord]]


def build(args: argparse.Namespace) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.width,
        intermediate_size=args.width * 8 // 3,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.heads // 3,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return LlamaForCausalLM(config).eval()


def passes(capture: GradientCapture, args: argparse.Namespace) -> Records:
    """Forward and backward over one batch, and the records of every component."""
    tokens = torch.randint(0, args.vocabulary, (args.examples, args.length), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}
    records = capture.record(batch, LanguageModelLoss().losses, torch.arange(args.examples), None, args.examples)
    return list(zip(capture.components, records, strict=True))


def timed(work: Callable[[], object]) -> tuple[float, object]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def project(projection: Projection, records: Records) -> list[Tensor]:
    return [projection.project(component, record) for component, record in records]


@contextmanager
def drawing(seconds: list[float]) -> Iterator[None]:
    """Adds up the time that traker takes to draw random matrices."""
    original = BasicProjector.generate_sketch_matrix

    def draw(self: BasicProjector, state: Tensor) -> None:
        took, _ = timed(lambda: original(self, state))
        seconds.append(took)

    BasicProjector.generate_sketch_matrix = draw
    try:
        yield
    finally:
        BasicProjector.generate_sketch_matrix = original


def ours(args: argparse.Namespace, seed: int, records: Records) -> tuple[dict[str, float], list[Tensor]]:
    projection = FactoredProjection(args.dimensions, seed=seed).start([c for c, _ in records])
    first, vectors = timed(lambda: project(projection, records))
    again, _ = timed(lambda: project(projection, records))
    return {"ours": first, "ours_without_drawing": again}, vectors


def rival(args: argparse.Namespace, seed: int, records: Records) -> tuple[dict[str, float], list[Tensor]]:
    budget = args.memory * 1024**3
    projection = TrakProjection(args.dimensions, backend="basic", seed=seed, memory_budget=budget)
    projection.start([c for c, _ in records])
    draws: list[float] = []
    with drawing(draws):
        seconds, vectors = timed(lambda: project(projection, records))
    return {"traker": seconds, "traker_without_drawing": seconds - sum(draws)}, vectors


def errors(vectors: list[Tensor], exact: Tensor) -> tuple[Tensor, Tensor]:
    """Of each matrix times the root of its dimensions, [c, pairs], and of whole gradients, [pairs]."""
    sizes = torch.tensor([v.shape[1] for v in vectors], dtype=torch.float64)
    found = torch.stack([v.double() @ v.double().mT for v in vectors])
    left, right = torch.triu_indices(*exact.shape[1:])

    def relative(found: Tensor, exact: Tensor) -> Tensor:
        lengths = exact.diagonal(dim1=-2, dim2=-1).sqrt()
        return ((found - exact) / lengths[..., :, None] / lengths[..., None, :])[..., left, right]

    return relative(found, exact) * sizes.sqrt()[:, None], relative(found.sum(0), exact.sum(0))


def rms(values: list[Tensor]) -> float:
    return float(torch.cat([v.flatten() for v in values]).square().mean().sqrt())


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model to 1024 dimensions, within a minute")
    parser.add_argument("--examples", type=int, default=8, help="of the batch")
    parser.add_argument("--length", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dimensions", type=int, default=8192)
    parser.add_argument("--memory", type=int, default=4, help="GiB for the random matrices of traker")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--heads", type=int, default=9, help="a third of them for keys and values")
    parser.add_argument("--vocabulary", type=int, default=49152)
    args = parser.parse_args()
    if args.quick:
        args.layers, args.width, args.heads, args.vocabulary, args.dimensions = 4, 192, 3, 4096, 1024
    return args


def rounds(args: argparse.Namespace) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds, and errors over all rounds."""
    times: dict[str, list[float]] = {}
    parts: dict[str, list[Tensor]] = {"ours": [], "traker": []}
    wholes: dict[str, list[Tensor]] = {"ours": [], "traker": []}
    with GradientCapture(build(args), WEIGHTS) as capture:
        passes(capture, args)  # warm-up
        for turn in range(args.repeats):
            seconds, records = timed(lambda: passes(capture, args))
            times.setdefault("passes", []).append(seconds)
            exact = torch.stack([record.dot_products(record).double() for _, record in records])
            for work in (ours, rival) if turn % 2 == 0 else (rival, ours):
                took, vectors = work(args, turn, records)
                for key, value in took.items():
                    times.setdefault(key, []).append(value)
                part, whole = errors(vectors, exact)
                parts["ours" if work is ours else "traker"].append(part)
                wholes["ours" if work is ours else "traker"].append(whole)
            print({key: round(values[-1], 2) for key, values in times.items()}, flush=True)
    found = {f"{name}_{kind}": rms(rows[name]) for kind, rows in (("part", parts), ("whole", wholes)) for name in rows}
    return {key: statistics.median(values) for key, values in times.items()}, found


def main() -> None:
    args = arguments()
    warnings.filterwarnings("ignore")
    times, error = rounds(args)
    each = {key: 1000 * value / args.examples for key, value in times.items()}
    print("median milliseconds for an example:", {key: round(value, 1) for key, value in each.items()})
    print("with passes:", {key: round(each[key] + each["passes"], 1) for key in ("ours", "traker")})
    print("root mean square errors:", {key: round(value, 4) for key, value in error.items()})
    result = {
        "speedup_traker": times["traker"] / times["ours"],
        "error_ratio_traker": error["ours_part"] / error["traker_part"],
        "error_ratio_whole": error["ours_whole"] / error["traker_whole"],
        "speedup_without_drawing": times["traker_without_drawing"] / times["ours_without_drawing"],
        "speedup_with_passes": (times["traker"] + times["passes"]) / (times["ours"] + times["passes"]),
        "ours_over_passes": times["ours"] / times["passes"],
    }
    print("RESULT", json.dumps({key: round(value, 4) for key, value in result.items()}))


if __name__ == "__main__":
    main()
