"""Instruction rows and, for each, another row that was made from it: the base set and its queries.

By default rows from templates (`pair_templates`), paraphrased by a second wording of everything. Or rows of a file, one
JSON object a line with the fields `instruction`, `input`, `output_a` and `output_b`: one prompt and two completions of
it by different authors, the first of which belongs to the base set.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from instruction_pool import InstructionRow, chat_tokens
from pair_templates import TOPICS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FIELDS = ("instruction", "input", "output_a", "output_b")
GENERATED = "model-generated"


@dataclass(frozen=True)
class PairSet:
    """Base rows, and one query for each in every setting.

    Attributes:
        origin: Where the rows come from, in a few words.
        base: The rows that are searched.
        queries: By setting, in the order of the base rows.
        left_out: Rows of the origin that were too long.
    """

    origin: str
    base: tuple[InstructionRow, ...]
    queries: dict[str, tuple[InstructionRow, ...]]
    left_out: int = 0

    def __len__(self) -> int:
        return len(self.base)

    @property
    def rewritten(self) -> str:
        """Name of the setting whose queries were there from the start."""
        return next(iter(self.queries))

    def sample(self, number: int, seed: int, fits: Callable[[InstructionRow], bool]) -> PairSet:
        """So many pairs, drawn at random from those whose rows all fit.

        Raises:
            ValueError: If there are fewer.
        """
        together = list(zip(self.base, *self.queries.values(), strict=True))
        fitting = [place for place, rows in enumerate(together) if all(map(fits, rows))]
        if len(fitting) < number:
            raise ValueError(
                f"`--queries {number}`: expected at most {len(fitting)}, the pairs of {self.origin} whose rows are not "
                f"longer than allowed ({len(self) - len(fitting)} are). Ask for fewer, or raise --max-tokens."
            )
        drawn = random.Random(seed).sample(fitting, number)
        queries = {name: tuple(rows[k] for k in drawn) for name, rows in self.queries.items()}
        return PairSet(self.origin, tuple(self.base[k] for k in drawn), queries, len(self) - len(fitting))

    def with_generated(self, completions: Sequence[str]) -> PairSet:
        """With the prompts of the queries answered by the model itself, as a setting of its own."""
        prompts = self.queries[self.rewritten]
        answered = tuple(replace(row, answer=text) for row, text in zip(prompts, completions, strict=True))
        return replace(self, queries={**self.queries, GENERATED: answered})


def template_pairs() -> PairSet:
    """All rows that the templates give, 20 of each topic, and their paraphrases, with one slot as it was."""
    rows: tuple[list[InstructionRow], list[InstructionRow]] = ([], [])
    for topic in TOPICS:
        for number, slots in enumerate(product(topic.first, topic.second)):
            for wording in (0, 1):
                filled = [slot[wording and place != number % 2] for place, slot in enumerate(slots)]
                question, answer = (text[wording].format(*filled) for text in (topic.ask, topic.answer))
                rows[wording].append(InstructionRow(f"{topic.name}-{number:02d}", topic.name, question, answer))
    return PairSet("templates", tuple(rows[0]), {"paraphrased": tuple(rows[1])})


def file_pairs(path: Path) -> PairSet:
    """The rows of a file; of those with the same prompt only the first.

    Raises:
        ValueError: If a line is not an object with the four fields as text, or a completion is empty.
    """
    found: dict[str, tuple[str, str]] = {}
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        instruction, input_, first, second = _fields(line, f"{path}:{number}")
        found.setdefault(f"{instruction}\n\n{input_}".strip(), (first, second))
    base, other = (
        tuple(
            InstructionRow(f"row-{k:05d}", path.stem, prompt, both[side])
            for k, (prompt, both) in enumerate(found.items())
        )
        for side in (0, 1)
    )
    return PairSet(path.name, base, {"other completion": other})


def _fields(line: str, place: str) -> list[str]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        row = None
    values = [row.get(name) if isinstance(row, dict) else None for name in FIELDS]
    if not all(isinstance(value, str) for value in values) or not all(values[k].strip() for k in (0, 2, 3)):
        raise ValueError(
            f"`--pairs`, {place}: expected a JSON object with the texts {', '.join(FIELDS)}, of which only 'input' may "
            "be empty. Remove or complete the line."
        )
    return values


def fits(tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> Callable[[InstructionRow], bool]:
    """Whether a row has at most so many tokens, its prompt included."""

    def check(row: InstructionRow) -> bool:
        return sum(map(len, chat_tokens(row, tokenizer))) <= max_tokens

    return check


def texts(rows: Iterable[InstructionRow]) -> list[str]:
    """What a search by words looks at: prompt and answer."""
    return [f"{row.question}\n{row.answer}" for row in rows]
