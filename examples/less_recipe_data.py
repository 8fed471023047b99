"""Rows of `less_recipe.py`: a pool from several sources, and targets with rows for selection and rows for the loss.

With a folder: alpaca, dolly, lima, self_instruct and tulu_eval in the pool, targets from gsm8k, mmlu and bbh, each in a
folder of that name with the files as they were published. Without one: the task families of `instruction_pool`, or
the templates of `pair_templates`; then a target's rows also stand in the pool, other ones.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from instruction_pool import FAMILIES, InstructionDataset, InstructionRow, PadRight, chat_tokens, instruction_rows
from pair_sets import fits, template_pairs
from torch.utils.data import DataLoader, Dataset

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH = 4
TARGETS = ("gsm8k", "mmlu/high_school_biology", "mmlu/sociology", "bbh/date_understanding", "bbh/sports_understanding")
TASKS = ("leg_counting", "calendar_arithmetic", "time_intervals")
MADE = tuple(family for family in FAMILIES if family != "coin_flip")  # which has too few different questions
TOPICS = ("cooking", "travel")

Pair = tuple[str, str]
Turn = tuple[list[InstructionRow], list[InstructionRow]]  # rows for selection, rows for the loss
Fits = Callable[[InstructionRow], bool]


@dataclass(frozen=True)
class Texts:
    """Rows before they are tokenised; by target two lists, which share no row with each other or the pool."""

    pool: dict[str, list[InstructionRow]]
    targets: dict[str, Turn]

    def all(self) -> list[InstructionRow]:
        parts = [*self.pool.values(), *(part for both in self.targets.values() for part in both)]
        return [row for part in parts for row in part]


@dataclass(frozen=True)
class RecipeData:
    """Tokenised: the pool, the rows for selection of one target after another, and the held-out ones by target."""

    pool: InstructionDataset
    queries: InstructionDataset
    held_out: dict[str, InstructionDataset]
    pad: PadRight

    @property
    def sources(self) -> list[str]:
        """Of each row of the pool."""
        return [row.family for row in self.pool.rows]

    def members(self, target: str) -> list[int]:
        """Places of a target's rows among the queries."""
        return [place for place, row in enumerate(self.queries.rows) if row.family == target]

    def loader(self, part: Dataset[Any], batch: int = BATCH, **options: Any) -> DataLoader[Any]:
        return DataLoader(part, batch, collate_fn=self.pad, **options)

    def describe(self) -> str:
        pool = ", ".join(f"{name} {number}" for name, number in Counter(self.sources).items())
        goals = [f"{name} {len(self.members(name))} and {len(part)}" for name, part in self.held_out.items()]
        return f"pool of {len(self.pool)} rows: {pool}\nrows for selection and for the loss: {', '.join(goals)}"


def recipe_data(
    texts: Texts, tokenizer: PreTrainedTokenizerBase, pool_rows: int, query_rows: int, held_out_rows: int, limit: int
) -> RecipeData:
    """Draws so many rows of at most ``limit`` tokens, the same ones every time; the pool is sorted by their number.

    Every source gives as many rows as the others; what small ones lack, the first one adds.

    Raises:
        ValueError: If there are fewer rows; names the source or target.
    """
    check = fits(tokenizer, limit)
    asked: list[InstructionRow] = []
    held_out: dict[str, list[InstructionRow]] = {}
    for name, (queries, tests) in texts.targets.items():
        asked += drawn(name, queries, query_rows, check)
        held_out[name] = drawn(name, tests, held_out_rows, check)
    taken = {row.question for part in (asked, *held_out.values()) for row in part}
    rows: list[InstructionRow] = []
    first, *others = texts.pool
    for name in others:
        rows += drawn(name, texts.pool[name], pool_rows // len(texts.pool), check, taken, fewer=True)
    rows = drawn(first, texts.pool[first], pool_rows - len(rows), check, taken) + rows
    rows.sort(key=lambda row: sum(map(len, chat_tokens(row, tokenizer))))  # batches without idle positions

    def tokenised(part: Sequence[InstructionRow]) -> InstructionDataset:
        return InstructionDataset(part, tokenizer, limit)

    goals = {name: tokenised(part) for name, part in held_out.items()}
    return RecipeData(tokenised(rows), tokenised(asked), goals, PadRight(tokenizer.pad_token_id))


def drawn(
    name: str,
    rows: Sequence[InstructionRow],
    number: int,
    check: Fits,
    taken: set[str] | None = None,
    *,
    fewer: bool = False,
) -> list[InstructionRow]:
    """So many rows with different questions in a random order, which does not depend on how many are asked for.

    Raises:
        ValueError: If there are fewer, and ``fewer`` is not allowed.
    """
    taken = set() if taken is None else taken
    found: list[InstructionRow] = []
    for row in random.Random(0).sample(rows, len(rows)):
        if len(found) == number:
            break
        if row.question not in taken and check(row):
            taken.add(row.question)
            found.append(row)
    if len(found) < number and not fewer:
        raise ValueError(
            f"{name}: expected {number} different rows that are short enough, it has {len(found)} of {len(rows)}. Ask "
            "for fewer rows, or raise --max-tokens."
        )
    return found


# -- what is made on the spot


def made_texts(targets: Sequence[str], pool_rows: int, query_rows: int, held_out_rows: int) -> Texts:
    """Rows of the task families; a target's stand in the pool, say what is wanted, and measure the loss.

    Twice as many as are asked for, because long ones are left out.
    """
    rows, queries, held_out = -(-2 * pool_rows // len(MADE)), 2 * query_rows, 2 * held_out_rows
    pool, goals = {}, {}
    for name in MADE:
        found = instruction_rows([name], rows + (queries + held_out) * (name in targets))
        pool[name] = found[:rows]
        goals[name] = (found[rows : rows + queries], found[rows + queries :])
    return Texts(pool, {name: goals[name] for name in targets})


def template_texts(targets: Sequence[str]) -> Texts:
    """The first twelve rows of each topic in the pool, and of a target four each to select by and to measure."""
    topics: dict[str, list[InstructionRow]] = {}
    for row in template_pairs().base:
        topics.setdefault(row.family, []).append(row)
    goals = {name: (topics[name][12:16], topics[name][16:]) for name in targets}
    return Texts({name: rows[:12] for name, rows in topics.items()}, goals)


# -- what a folder holds


def folder_texts(folder: Path, targets: Sequence[str]) -> Texts:
    """All rows of the sources and targets.

    Raises:
        ValueError: If a file is missing.
    """
    pool = {name: _rows(name, pairs(_file(folder, path))) for name, (path, pairs) in SOURCES.items()}
    return Texts(pool, {name: _target(folder, name) for name in targets})


def known_target(name: str) -> bool:
    """Whether it has the form of a target in a folder."""
    return name == "gsm8k" or re.fullmatch(r"(mmlu|bbh)/\w+", name) is not None


def _target(folder: Path, name: str) -> Turn:
    kind, _, part = name.partition("/")
    if kind == "gsm8k":
        both = (_gsm8k(_file(folder, f"gsm8k/{split}.jsonl")) for split in ("train", "test"))
    elif kind == "mmlu":
        archive = _file(folder, "mmlu/mmlu.zip")
        both = (_mmlu(archive, part, splits) for splits in (("dev", "val"), ("test",)))
    else:
        examples = json.loads(_file(folder, f"bbh/bbh/{part}.json").read_text(encoding="utf-8"))["examples"]
        rows = [(str(row["input"]), str(row["target"])) for row in examples]
        random.Random(0).shuffle(rows)
        both = (iter(rows[: len(rows) // 3]), iter(rows[len(rows) // 3 :]))
    selection, loss = (_rows(name, pairs) for pairs in both)
    return selection, loss


def _rows(name: str, pairs: Iterator[Pair]) -> list[InstructionRow]:
    kept = ((question.strip(), answer.strip()) for question, answer in pairs)
    full = [(question, answer) for question, answer in kept if question and answer]
    return [InstructionRow(f"{name}-{k:05d}", name, *pair) for k, pair in enumerate(full)]


def _file(folder: Path, path: str) -> Path:
    if not (folder / path).is_file():
        raise ValueError(f"`--data {folder}`: expected the file {path} there.")
    return folder / path


def _lines(file: Path) -> Iterator[Mapping[str, Any]]:
    with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def _alpaca(file: Path) -> Iterator[Pair]:
    """Instruction, input and output, in a list or a line each; rows of several turns are left out."""
    rows = _lines(file) if ".jsonl" in file.name else json.loads(file.read_text(encoding="utf-8"))
    for row in rows:
        if not row.get("history"):
            yield f"{row['instruction']}\n\n{row['input']}", row["output"]


def _dolly_hhrlhf(file: Path) -> Iterator[Pair]:
    for row in _lines(file):
        yield row["prompt"].split("### Instruction:\n", 1)[-1].removesuffix("\n\n### Response:\n"), row["response"]


def _self_instruct(file: Path) -> Iterator[Pair]:
    for row in _lines(file):
        for instance in row["instances"]:
            yield f"{row['instruction']}\n\n{instance['input']}", instance["output"]


def _tulu_eval(file: Path) -> Iterator[Pair]:
    """The first completion of each prompt."""
    for row in _lines(file):
        yield row["prompt"], row["completions"][0]["completion"]


def _gsm8k(file: Path) -> Iterator[Pair]:
    """Without the annotations of a calculator, <<48/2=24>>."""
    for row in _lines(file):
        yield row["question"], re.sub(r"<<.*?>>", "", row["answer"])


def _mmlu(archive: Path, subject: str, splits: Sequence[str]) -> Iterator[Pair]:
    """The answer is the letter with the text of the choice: of a letter alone, the loss is one token's."""
    with zipfile.ZipFile(archive) as files:
        for split in splits:
            name = f"data/{split}/{subject}_{split}.csv"
            if name not in files.namelist():
                raise ValueError(f"`--targets mmlu/{subject}`: expected {name} in {archive}.")
            with files.open(name) as file:
                for question, *choices, right in csv.reader(io.TextIOWrapper(file, encoding="utf-8")):
                    lettered = [f"{letter}. {text}" for letter, text in zip("ABCD", choices, strict=True)]
                    yield "\n".join([question, *lettered]), lettered["ABCD".index(right)]


SOURCES: dict[str, tuple[str, Callable[[Path], Iterator[Pair]]]] = {
    "alpaca": ("alpaca/alpaca_cleaned.jsonl.gz", _alpaca),
    "dolly": ("dolly/dolly_3k.json", _alpaca),
    "dolly_hhrlhf": ("dolly/dolly_hhrlhf_train_small.jsonl", _dolly_hhrlhf),
    "lima": ("lima/lima.json", _alpaca),
    "self_instruct": ("self_instruct/seed_tasks.jsonl", _self_instruct),
    "tulu_eval": ("tulu_eval/eval_instances_tulu_1.jsonl", _tulu_eval),
}
