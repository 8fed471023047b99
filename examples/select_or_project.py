"""Which parameters' gradients find the training example behind a query: chosen components against random projections.

    python examples/select_or_project.py [--quick] [--pairs FILE] [--queries 200] [--out runs/select_or_project]

The study of "Select or Project?" (arXiv 2601.16651) on SmolLM2-135M-Instruct. Every query was made from one row of a
base set: reworded, and answered by the model itself. BM25 gives it five candidates, the row that it was made from
among them; the gradients of the answers' loss are to find that row. Compared are the full gradient, each kind of
weight matrix, each single one, a greedy choice of them (on the queries that it was made on, and on others), random
projections of the full gradient, and BM25 alone.

All that takes minutes is kept in the output folder: a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import re
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from instruction_pool import InstructionDataset, PadRight
from pair_sets import PairSet, file_pairs, fits, template_pairs, texts
from smollm2 import load_smollm2
from study_findings import DOTS
from study_model import completions, tiny_model, tiny_tokenizer, train
from study_report import BARE, Measured, Run, write_report
from study_stages import Stage, Stages
from torch import Tensor
from torch.utils.data import DataLoader
from transformers.utils.logging import disable_progress_bar

from lightning_influence import BM25Filter, GradientDot, LanguageModelLoss, Store, find_components
from lightning_influence.estimators.component_dots import ComponentDots
from lightning_influence.estimators.projected_dot import ProjectedDot, pair_products
from lightning_influence.evaluation import candidate_recall
from lightning_influence.projections import FactoredProjection, Projection, TrakProjection

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WEIGHTS = ["_proj$", "embed_tokens"]  # every weight matrix; the head is tied to the embedding
POSITIONS = 1024  # tokens of a batch
SAMPLE = 24  # examples on which bare passes are timed
TOGETHER = 8  # examples that are projected at a time
TINY_STEPS = 10


class Bench:
    """Model, rows and candidates of one run.

    Attributes:
        base: The rows that are searched.
        queries: Those of all settings, one setting after another.
        candidates: Rows of the base for each query, int64 [q, b].
        similarities: Their BM25 scores, [q, b].
    """

    def __init__(self, run: Run, pairs: PairSet, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.run, self.pairs, self.model = run, pairs, model
        pad = PadRight(tokenizer.pad_token_id)
        self.queried = [row for rows in pairs.queries.values() for row in rows]
        both = [InstructionDataset(rows, tokenizer, run.longest) for rows in (pairs.base, self.queried)]
        assert [len(data) for data in both] == [len(pairs.base), len(self.queried)]  # all of them fit
        self.base, self.queries = (DataLoader(data, collate_fn=pad) for data in both)
        self.components = find_components(model, WEIGHTS)
        search, sources = BM25Filter(texts(pairs.base)), torch.arange(len(pairs))
        words = texts(self.queried)
        self.candidates = search.candidates(words, run.candidates, sources.repeat(len(pairs.queries)))
        self.found = search.candidates(words, run.candidates)
        all_scores = torch.tensor([search.similarities(text).tolist() for text in words])
        self.similarities = all_scores.gather(1, self.candidates)
        self.store = Store.resume(run.out / "recording", model, self.components, rows=self.fingerprint())

    def fingerprint(self) -> str:
        """Of all rows and candidates: a recording of others is not taken up."""
        said = [[row.question, row.answer] for row in (*self.pairs.base, *self.queried)]
        return hashlib.sha256(json.dumps([said, self.candidates.tolist()]).encode()).hexdigest()

    def positions(self) -> int:
        """Tokens of all rows, each once."""
        return sum(self.base.dataset.lengths()) + sum(self.queries.dataset.lengths())

    def measured(self, dots: dict[str, ComponentDots]) -> Measured:
        """For the report, without projections yet."""
        sources = torch.arange(len(self.pairs))
        return Measured(
            origin=self.pairs.origin,
            rewritten=self.pairs.rewritten,
            left_out=self.pairs.left_out,
            tokens=self.positions(),
            parameters=sum(parameter.numel() for parameter in self.model.parameters()),
            dots=dots,
            similarities=self.by_setting(self.similarities),
            recall={name: candidate_recall(found, sources) for name, found in self.by_setting(self.found).items()},
            cosines={},
            shares={},
        )

    def by_setting(self, values: Tensor) -> dict[str, Tensor]:
        """What is known of all queries, [q, ...], taken apart."""
        return dict(zip(self.pairs.queries, values.split(len(self.pairs)), strict=True))


def make_pairs(run: Run, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stages: Stages) -> PairSet:
    """The base set, its queries, and the model's own answers to them."""
    whole = template_pairs() if run.pairs is None else file_pairs(run.pairs)
    pairs = whole.sample(run.queries, run.seed, fits(tokenizer, run.max_tokens))
    file = run.out / "completions.jsonl"
    prompts = pairs.queries[pairs.rewritten]
    with stages.stage("completions by the model", len(prompts), resumed=file.exists()) as stage:
        said = completions(model, tokenizer, prompts, file, run.new_tokens, stage.advance)
    return pairs.with_generated(said)


def load(run: Run) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2, or with --quick a tiny model, trained on the base rows for a few steps."""
    if not run.quick:
        return load_smollm2(run.cache)
    pairs = template_pairs() if run.pairs is None else file_pairs(run.pairs)
    tokenizer = tiny_tokenizer(texts([*pairs.base, *pairs.queries[pairs.rewritten]]))
    model = tiny_model(tokenizer, run.seed)
    base = pairs.sample(run.queries, run.seed, fits(tokenizer, run.max_tokens)).base
    data = InstructionDataset(base, tokenizer, run.max_tokens)
    train(model, data, PadRight(tokenizer.pad_token_id), TINY_STEPS, run.seed)
    return model, tokenizer


def component_dots(bench: Bench, stages: Stages) -> dict[str, ComponentDots]:
    """Products of every query with its candidates, by component, all settings in one go: base rows are passed once."""
    whole = _recorded(bench, stages)
    n, found = len(bench.pairs), {}
    for k, setting in enumerate(bench.pairs.queries):
        own = (whole.pairs[:, 0] >= k * n) & (whole.pairs[:, 0] < (k + 1) * n)
        pairs = whole.pairs[own] - torch.tensor([k * n, 0])
        squares = whole.query_squares[:, k * n : (k + 1) * n]
        found[setting] = replace(
            whole, query_ids=tuple(range(n)), pairs=pairs, dots=whole.dots[:, own], query_squares=squares
        )
    return found


def _recorded(bench: Bench, stages: Stages) -> ComponentDots:
    """From the folder when all of it is there; else taken, going on where an earlier run stopped."""
    kept = bench.store.contents
    if "component_dots" in kept["json"]:
        return ComponentDots.load(bench.store)
    dots = GradientDot(bench.model, components=bench.components, memory_budget=bench.run.memory)
    distinct = len(bench.pairs) + len(bench.queried)
    with stages.stage(DOTS, distinct, bench.positions(), resumed="component_dots.pairs" in kept["rows"]) as stage:
        return dots.pairs(
            bench.queries,
            bench.base,
            bench.candidates,
            batch_positions=POSITIONS,
            store=bench.store,
            bar=stage.bar,
        )


def projections(run: Run) -> Iterator[tuple[str, Projection]]:
    """All that are asked for, by name."""
    for share in run.shares:
        for seed in range(run.seed, run.seed + run.seeds):
            size = f"{100 * share:g} %, seed {seed}"
            yield f"factored projection, {size}", FactoredProjection(share, seed=seed, memory_budget=run.memory // 2)
            if run.trak:
                yield f"TRAK projection, {size}", TrakProjection(share, seed=seed, memory_budget=run.memory)


def projected_cosines(bench: Bench, projection: Projection, name: str, stages: Stages) -> dict[str, Tensor]:
    """Cosines of projected gradients, [q, b] by setting.

    Base rows are projected and kept, as many at a time as the memory budget holds; queries stream by, once for every
    block of them. What is kept is rounded to bfloat16, after scaling to unit length.
    """
    estimator = ProjectedDot(bench.model, projection, components=bench.components, progress=False, batch_size=TOGETHER)
    table = re.sub(r"[^A-Za-z0-9.]+", "-", name)
    resumed = table in bench.store.contents["rows"]
    writer = bench.store.row_writer(table, range(len(bench.queried)), shard_rows=TOGETHER)
    left, n = list(writer.missing_ids), len(bench.pairs)
    if left:
        block = max(1, bench.run.memory // (2 * sum(estimator.sizes.values())))
        starts = range(0, n, block)
        found = torch.full(bench.candidates.shape, torch.nan)
        with stages.stage(name, n + len(starts) * len(left), resumed=resumed) as stage:
            for start in starts:
                kept = _projected(estimator, bench.base, range(start, min(n, start + block)), stage)
                for queries in _parts(left):
                    _compare(bench, estimator, queries, kept, start, found, stage)
                    if start == starts[-1]:
                        writer.write(queries, {"cosine": found[queries]})
    parts = list(bench.store.read_rows(table))
    return bench.by_setting(torch.cat([part.values["cosine"] for part in parts]))


def _projected(estimator: ProjectedDot, data: DataLoader[Any], rows: Sequence[int], stage: Stage) -> Tensor:
    """Unit vectors [n, k] in bfloat16, a batch at a time."""
    kept = []
    for part in _parts(rows):
        vectors = _vectors(estimator, data, part)
        kept.append((vectors / vectors.norm(dim=1, keepdim=True).clamp_min(1e-30)).bfloat16())
        stage.advance(len(part))
    return torch.cat(kept)


def _compare(
    bench: Bench, estimator: ProjectedDot, queries: Sequence[int], kept: Tensor, start: int, found: Tensor, stage: Stage
) -> None:
    """Fill in the cosines of some queries with those of their candidates that are kept."""
    vectors = _vectors(estimator, bench.queries, queries)
    for row, query in enumerate(queries):
        places = bench.candidates[query] - start
        inside = (places >= 0) & (places < len(kept))
        others = kept[places[inside]].float()
        pairs = torch.tensor([[0, k] for k in range(len(others))], dtype=torch.int64).reshape(-1, 2)
        found[query, inside] = pair_products(vectors[row : row + 1], others, pairs, normalise=True)
    stage.advance(len(queries))


def _vectors(estimator: ProjectedDot, data: DataLoader[Any], rows: Sequence[int]) -> Tensor:
    part = torch.utils.data.Subset(data.dataset, list(rows))
    return estimator.project(DataLoader(part, len(rows), collate_fn=data.collate_fn))


def _parts(rows: Sequence[int]) -> Iterator[list[int]]:
    for start in range(0, len(rows), TOGETHER):
        yield list(rows[start : start + TOGETHER])


def bare_passes(bench: Bench, stages: Stages) -> None:
    """Forward and backward over a sample of the rows, as in training: what all else is measured by."""
    data, loss = bench.base.dataset, LanguageModelLoss().where_supervised()
    lengths = data.lengths()
    drawn = torch.randperm(len(data), generator=torch.Generator().manual_seed(bench.run.seed))[:SAMPLE].tolist()
    drawn.sort(key=lambda k: -lengths[k])
    with stages.stage(BARE, len(drawn), sum(lengths[k] for k in drawn)) as stage:
        while drawn:
            count = max(1, POSITIONS // lengths[drawn[0]])
            part, drawn = drawn[:count], drawn[count:]
            loss.losses(bench.model, bench.base.collate_fn([data[k] for k in part])).sum().backward()
            bench.model.zero_grad()
            stage.advance(len(part))


def parse(arguments: list[str]) -> Run:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model trained for a few steps, within a minute")
    parser.add_argument("--pairs", type=Path, help="JSON lines with instruction, input, output_a, output_b")
    parser.add_argument("--queries", type=int, help="number of pairs; 200, or 60 with --quick")
    parser.add_argument("--candidates", type=int, default=5, help="of each query, its true source among them")
    parser.add_argument("--max-tokens", type=int, default=200, help="longer rows are left out")
    parser.add_argument("--new-tokens", type=int, help="of a completion by the model; 96, or 24 with --quick")
    parser.add_argument("--shares", type=float, nargs="*", default=[0.01, 0.05], help="of the parameters to project to")
    parser.add_argument("--seeds", type=int, default=1, help="number of random projections of each size")
    parser.add_argument("--trak", action="store_true", help="traker's projections too; slow")
    parser.add_argument("--memory", type=float, default=3, help="GiB for what is kept of examples")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/select_or_project"), help="folder for everything written"
    )
    parser.add_argument("--cache", type=Path, default=Path("runs/models"), help="folder for the model's weights")
    return _checked(
        parser, parser.parse_args(arguments), shlex.join(["python", "examples/select_or_project.py", *arguments])
    )


def _checked(parser: argparse.ArgumentParser, given: argparse.Namespace, command: str) -> Run:
    queries = given.queries if given.queries is not None else (60 if given.quick else 200)
    new_tokens = given.new_tokens if given.new_tokens is not None else (24 if given.quick else 96)
    if not 2 <= given.candidates <= queries:
        parser.error("expected --candidates from 2 to the number of --queries, whose sources are the base set")
    if min(given.max_tokens, new_tokens, given.seeds) < 1 or given.memory <= 0:
        parser.error("expected --max-tokens, --new-tokens and --seeds >= 1 and --memory > 0")
    if not all(0 < share <= 1 for share in given.shares):
        parser.error("expected --shares of the parameters, such as 0.01")
    if given.pairs is not None and not given.pairs.is_file():
        parser.error(f"expected --pairs to be a file, {given.pairs} is none")
    return Run(
        quick=given.quick,
        pairs=given.pairs,
        queries=queries,
        candidates=given.candidates,
        max_tokens=given.max_tokens,
        new_tokens=new_tokens,
        shares=tuple(given.shares),
        seeds=given.seeds,
        trak=given.trak,
        memory=round(given.memory * 1024**3),
        seed=given.seed,
        out=given.out,
        cache=given.cache,
        command=command,
    )


def silence() -> None:
    """Bars for loading weights, and transformers' notes on settings for generation that are not used."""
    disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)


def main(arguments: list[str]) -> None:
    started = time.perf_counter()
    run = parse(arguments)
    silence()
    stages = Stages(run.out)
    model, tokenizer = load(run)
    bench = Bench(run, make_pairs(run, model, tokenizer, stages), model, tokenizer)
    sizes = f"{bench.positions()} tokens, {len(bench.components)} components"
    print(f"{len(bench.pairs)} pairs of {bench.pairs.origin}, {sizes}", flush=True)
    if BARE not in stages.costs:
        bare_passes(bench, stages)
    measured = bench.measured(component_dots(bench, stages))
    if run.shares:  # projections may take hours
        write_report(run, measured, stages, time.perf_counter() - started)
    for name, projection in projections(run):
        measured = measured.with_projection(
            name, projection.dimensions, projected_cosines(bench, projection, name, stages)
        )
    print(write_report(run, measured, stages, time.perf_counter() - started))


if __name__ == "__main__":
    main(sys.argv[1:])
