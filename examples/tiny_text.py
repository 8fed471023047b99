"""Small texts for examples, made on the spot or from a file, with a token for each word; and a small GPT-NeoX."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import GPTNeoXConfig

PAD, END, UNKNOWN = 0, 1, 2

# Of each topic: who, does, what. The other words are the same everywhere.
TOPICS = {
    "sea": (
        ("sailor", "captain", "fisherman", "diver", "whale", "harbour pilot"),
        ("steers", "anchors", "follows", "salts", "hauls in", "sinks"),
        ("boat", "net", "reef", "tide", "sail", "lighthouse ship"),
    ),
    "kitchen": (
        ("cook", "baker", "waiter", "grandmother", "butcher", "pastry chef"),
        ("stirs", "tastes", "bakes", "peels", "slices up", "burns"),
        ("soup", "bread", "onion", "cake", "pan", "apple pie"),
    ),
    "court": (
        ("judge", "lawyer", "witness", "clerk", "thief", "chief prosecutor"),
        ("accuses", "defends", "sentences", "questions", "swears in", "bribes"),
        ("jury", "suspect", "verdict", "law", "evidence", "prison guard"),
    ),
    "garden": (
        ("gardener", "bee", "farmer", "child", "mole", "old beekeeper"),
        ("waters", "plants", "prunes", "rakes", "digs up", "mows"),
        ("rose", "lawn", "hedge", "tulip", "compost", "pear tree"),
    ),
}
ADJECTIVES = ("old", "quiet", "quick", "tired", "clever", "small", "proud", "careful")
TIMES = ("at dawn", "every day", "in winter", "without a word", "for an hour", "again", "on sunday", "before noon")


def made_sentences(n: int, seed: int) -> list[tuple[str, str]]:
    """Pairs (sentence, topic), topics in turn."""
    draw = random.Random(seed)
    names = list(TOPICS)
    found = []
    for k in range(n):
        topic = names[k % len(names)]
        who, does, what = (draw.choice(words) for words in TOPICS[topic])
        first, second = draw.choice(ADJECTIVES), draw.choice(ADJECTIVES)
        found.append((f"the {first} {who} {does} the {second} {what} {draw.choice(TIMES)}", topic))
    return found


def lines_of(file: Path) -> list[str]:
    """Lines of a text file that hold at least three words.

    Raises:
        ValueError: If there is none.
    """
    lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    found = [line for line in lines if len(line.split()) > 2]
    if not found:
        raise ValueError(f"{file}: expected lines of text, three words or more in each.")
    return found


class Words:
    """A token for each of the most frequent words; others share one."""

    def __init__(self, texts: Iterable[str], limit: int = 8000) -> None:
        counts = Counter(word for text in texts for word in text.split())
        kept = sorted(counts, key=lambda word: (-counts[word], word))[: limit - 3]
        self.numbers = {word: k + 3 for k, word in enumerate(kept)}

    def __len__(self) -> int:
        return len(self.numbers) + 3

    def encode(self, text: str) -> list[int]:
        """Tokens of the words, and the end."""
        return [*(self.numbers.get(word, UNKNOWN) for word in text.split()), END]

    def windows(self, texts: Sequence[str], length: int) -> torch.Tensor:
        """All texts one after another, cut into rows [n, length]; what is left over is dropped."""
        stream = torch.tensor([token for text in texts for token in self.encode(text)])
        return stream[: len(stream) // length * length].reshape(-1, length)


def neox_config(vocabulary: int, width: int, layers: int, positions: int) -> GPTNeoXConfig:
    """GPT-NeoX with two heads; of a classifier too, which reads a row at its last token before the padding."""
    from transformers import GPTNeoXConfig

    return GPTNeoXConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=4 * width,
        max_position_embeddings=positions,
        use_cache=False,
        pad_token_id=PAD,
        bos_token_id=END,
        eos_token_id=END,
    )
