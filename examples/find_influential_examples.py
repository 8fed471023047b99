"""Which training rows made the model answer like this?

    python examples/find_influential_examples.py "How many legs have two dogs?" "8" [--rows FILE] [--quick]

Of SmolLM2-135M-Instruct and rows of ten task families, or those of a file (JSON lines with `question` and `answer`).
BM25 finds candidates by their words; influence functions with EK-FAC on the MLP layers score these. A score above 0:
training on the row makes the answer more likely. All candidates are written to a file, the most helpful one first.
`--quick` takes a tiny model, made and trained on the spot, and rows from templates.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from instruction_pool import InstructionDataset, InstructionRow, PadRight, instruction_rows
from pair_sets import template_pairs
from smollm2 import load_smollm2
from study_model import tiny_model, tiny_tokenizer, train
from torch.utils.data import DataLoader
from transformers.utils.logging import disable_progress_bar

from lightning_influence import EKFAC, BM25Filter, CandidateScores, InfluenceFunction, TwoStage

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Texts(InstructionDataset):
    """Tokenised rows that keep their text, for the filter."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        return {**super().__getitem__(index), "text": f"{row.question} {row.answer}"}


def rows_of(file: Path) -> list[InstructionRow]:
    """Rows of a JSON lines file; `id` and `family` may be missing.

    Raises:
        ValueError: If a line lacks a question or an answer, or there is no line.
    """
    found = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        row = json.loads(line)
        if not (isinstance(row, dict) and row.get("question") and row.get("answer")):
            raise ValueError(f"{file}, line {number}: expected an object with `question` and `answer`.")
        name = str(row.get("id", f"line-{number}"))
        found.append(InstructionRow(name, str(row.get("family", "")), str(row["question"]), str(row["answer"])))
    if not found:
        raise ValueError(f"{file}: expected a line for each row, it has none.")
    return found


def rows_for(options: argparse.Namespace) -> Sequence[InstructionRow]:
    """Those of the file, of the templates, or of the task families."""
    if options.rows:
        return rows_of(options.rows)
    if not options.quick:
        return instruction_rows(rows_per_family=options.rows_per_family)
    rows = template_pairs().base
    families = dict.fromkeys(row.family for row in rows)
    return [row for f in families for row in [r for r in rows if r.family == f][: options.rows_per_family]]


def load(
    options: argparse.Namespace, rows: Sequence[InstructionRow]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2; or a tiny model trained on the rows for a few steps."""
    if not options.quick:
        return load_smollm2(options.cache)
    tokenizer = tiny_tokenizer([f"{row.question} {row.answer}" for row in rows])
    model = tiny_model(tokenizer, options.seed)
    train(model, InstructionDataset(rows, tokenizer), PadRight(tokenizer.pad_token_id), steps=30, seed=options.seed)
    return model, tokenizer


def find(options: argparse.Namespace, rows: Sequence[InstructionRow]) -> tuple[CandidateScores, Texts]:
    """Influence of the candidates on the answer, and the rows that were searched."""
    model, tokenizer = load(options, rows)
    pool = Texts(rows, tokenizer, options.max_tokens)
    asked = Texts([InstructionRow("asked", "", options.prompt, options.answer)], tokenizer, options.max_tokens)
    if not len(asked) or len(pool) < options.candidates:
        raise ValueError(
            f"of at most {options.max_tokens} tokens are {len(pool)} rows and {len(asked)} of 1 prompt; expected the "
            f"prompt and {options.candidates} candidates. Raise --max-tokens or lower --candidates."
        )
    print(f"{len(pool)} rows; too long and left out: {sum(pool.too_long.values())}", flush=True)
    pad = PadRight(tokenizer.pad_token_id)
    queries, data = (DataLoader(part, 4, collate_fn=pad) for part in (asked, pool))

    influence = InfluenceFunction(model, EKFAC(seed=options.seed), components="mlp").fit(data)
    search = TwoStage(BM25Filter, influence, k=options.candidates, text="text")
    return search.score(queries, data), pool


def ranked(scores: CandidateScores, pool: Texts) -> list[dict[str, Any]]:
    """All candidates, most helpful first."""
    by_words = {k: place for place, k in enumerate(scores.candidates[0], start=1)}
    found = []
    for rank, (k, score) in enumerate(scores.top(len(by_words)), start=1):
        row = pool.rows[int(k)]
        line = {"rank": rank, "score": score, "rank_by_words": by_words[k], "id": row.id, "family": row.family}
        found.append({**line, "question": row.question, "answer": row.answer})
    return found


def show(lines: Sequence[dict[str, Any]]) -> str:
    """A line of the terminal for each row, long ones cut."""
    head = f"{'rank':>4}  {'score':>10}  {'by words':>8}  row"
    rows = [f"{x['rank']:>4}  {x['score']:>10.4g}  {x['rank_by_words']:>8}  {x['id']}: {_short(x)}" for x in lines]
    return "\n".join([head, *rows])


def _short(line: dict[str, Any], width: int = 70) -> str:
    question = " ".join(line["question"].split())
    return f"{question if len(question) <= width else question[: width - 3] + '...'} -> {line['answer']}"


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("prompt", help="what the model was asked")
    parser.add_argument("answer", help="what it answered, or should have")
    parser.add_argument("--rows", type=Path, help="JSON lines with question and answer, in place of the task families")
    parser.add_argument("--rows-per-family", type=int, help="30, or 4 with --quick")
    parser.add_argument("--candidates", type=int, help="rows that are scored, 50; or 20 with --quick")
    parser.add_argument("--top", type=int, default=5, help="rows that are shown")
    parser.add_argument("--max-tokens", type=int, default=160, help="longer rows are left out")
    parser.add_argument("--quick", action="store_true", help="a tiny model, made and trained on the spot")
    parser.add_argument("--seed", type=int, default=0, help="of rows, labels for the curvature and the tiny model")
    parser.add_argument("--out", type=Path, default=Path("runs/influential.jsonl"), help="file for all candidates")
    parser.add_argument("--cache", type=Path, default=Path("runs/models"), help="folder for the model's weights")
    options = parser.parse_args(arguments)
    if options.candidates is None:
        options.candidates = 20 if options.quick else 50
    if options.rows_per_family is None:
        options.rows_per_family = 4 if options.quick else 30
    if min(options.candidates, options.rows_per_family, options.top, options.max_tokens) < 1:
        parser.error("expected --candidates, --rows-per-family, --top and --max-tokens >= 1")
    if options.rows is not None and not options.rows.is_file():
        parser.error(f"expected --rows to be a file, {options.rows} is none")
    return options


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.manual_seed(options.seed)
    try:
        scores, pool = find(options, rows_for(options))
    except ValueError as error:
        sys.exit(f"find_influential_examples.py: {error}")
    lines = ranked(scores, pool)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    print(f"{options.prompt} -> {options.answer}\n\nmost helpful of {len(lines)} candidates")
    print(show(lines[: options.top]))
    print("\nmost harmful")
    print(show(lines[::-1][: options.top]))
    print(f"\nall candidates: {options.out}")


if __name__ == "__main__":
    main(sys.argv[1:])
