"""Instruction rows from the task families of `reasoning-gym`, as chats with a loss on the answer alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Dataset

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FAMILIES = (
    "leg_counting",
    "basic_arithmetic",
    "calendar_arithmetic",
    "coin_flip",
    "family_relationships",
    "gsm_symbolic",
    "letter_counting",
    "sentence_reordering",
    "simple_geometry",
    "time_intervals",
)
IGNORED = -100


@dataclass(frozen=True)
class InstructionRow:
    """One task. `id` names family and position, and stays the same whatever other rows are asked for."""

    id: str
    family: str
    question: str
    answer: str


def instruction_rows(
    families: Sequence[str] = FAMILIES, rows_per_family: int = 30, seed: int = 0
) -> list[InstructionRow]:
    """`rows_per_family` rows with different questions of each family, family after family.

    Raises:
        ValueError: a family cannot give that many different questions.
    """
    import reasoning_gym

    rows: list[InstructionRow] = []
    for family in families:
        tasks = reasoning_gym.create_dataset(family, size=2 * rows_per_family, seed=seed)
        unique: dict[str, InstructionRow] = {}
        for position, task in enumerate(tasks):
            row = InstructionRow(f"{family}-{position:04d}", family, task["question"], str(task["answer"]))
            unique.setdefault(row.question, row)
            if len(unique) == rows_per_family:
                break
        else:
            raise ValueError(
                f"`instruction_rows(rows_per_family={rows_per_family})`: expected that many different "
                f"questions, {family!r} has {len(unique)}. Ask for fewer rows."
            )
        rows += unique.values()
    return rows


class InstructionDataset(Dataset[dict[str, torch.Tensor]]):
    """Tokenised rows: `input_ids` and `labels` [t] (int64), labels -100 up to the answer.

    The answer and the end-of-turn token after it are supervised. Rows longer than `max_length` tokens are
    left out and counted by family in `too_long`; `rows` are the ones kept, in the order of the items.
    """

    def __init__(
        self, rows: Sequence[InstructionRow], tokenizer: PreTrainedTokenizerBase, max_length: int = 160
    ) -> None:
        self.rows: list[InstructionRow] = []
        self.too_long: Counter[str] = Counter()
        self._items: list[dict[str, torch.Tensor]] = []
        for row in rows:
            prompt, answer = chat_tokens(row, tokenizer)
            if len(prompt) + len(answer) > max_length:
                self.too_long[row.family] += 1
                continue
            labels = [IGNORED] * len(prompt) + answer
            self._items.append({"input_ids": torch.tensor(prompt + answer), "labels": torch.tensor(labels)})
            self.rows.append(row)

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self._items[index]

    def lengths(self) -> list[int]:
        """Number of tokens of each item, the prompt included."""
        return [len(item["labels"]) for item in self._items]


def chat_tokens(row: InstructionRow, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Tokens of the prompt in the tokenizer's chat template, and of the answer with the end of its turn."""
    question = [{"role": "user", "content": row.question}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
    answer = tokenizer(row.answer + str(tokenizer.eos_token), add_special_tokens=False).input_ids
    return list(prompt), list(answer)


class PadRight:
    """Collate function: items padded on the right to the longest, [n, t] each, with `attention_mask`."""

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, items: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        def padded(values: list[torch.Tensor], padding: int) -> torch.Tensor:
            return torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=padding)

        return {
            "input_ids": padded([item["input_ids"] for item in items], self.pad_token_id),
            "attention_mask": padded([torch.ones_like(item["input_ids"]) for item in items], 0),
            "labels": padded([item["labels"] for item in items], IGNORED),
        }


def length_statistics(dataset: InstructionDataset) -> list[dict[str, Any]]:
    """Rows, and median and greatest number of tokens (all of them, supervised ones), for each family."""
    table: list[dict[str, Any]] = []
    for family in dict.fromkeys(row.family for row in dataset.rows):
        items = [dataset[i] for i, row in enumerate(dataset.rows) if row.family == family]
        tokens = torch.tensor([len(item["labels"]) for item in items])
        supervised = torch.tensor([int((item["labels"] != IGNORED).sum()) for item in items])
        table.append(
            {
                "family": family,
                "rows": len(items),
                "tokens": (int(tokens.median()), int(tokens.max())),
                "supervised": (int(supervised.median()), int(supervised.max())),
                "too_long": dataset.too_long[family],
            }
        )
    return table
