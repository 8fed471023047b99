from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_influence.capture import ExampleLoader
from lightning_influence.estimators.embedding_similarity import EmbeddingSimilarity
from lightning_influence.estimators.lexical import Lexical
from lightning_influence.filters import KNNFilter

POOL = [{"text": text} for text in ("the cat sat", "two plus two", "a dog ran", "one plus one", "go home now", "")]
QUERIES = [{"text": "what is one plus one"}, {"text": "the dog"}]


def embed(texts: list[str]) -> np.ndarray:
    return np.array([[len(text), text.count("o"), text.count("t") - 1.0 if text else 0.0] for text in texts])


def reference(left: np.ndarray, right: np.ndarray) -> list[list[float]]:
    rows = []
    for a in left:
        row = []
        for b in right:
            lengths = float(np.sqrt((a**2).sum() * (b**2).sum()))
            row.append(float((a * b).sum()) / lengths if lengths > 0 else 0.0)
        rows.append(row)
    return rows


EXPECTED = reference(embed([row["text"] for row in QUERIES]), embed([row["text"] for row in POOL]))
VECTORS = {
    "train_vectors": embed([row["text"] for row in POOL]),
    "query_vectors": embed([row["text"] for row in QUERIES]),
}


@pytest.mark.parametrize(
    "similarity",
    [
        EmbeddingSimilarity(embed, "text"),
        EmbeddingSimilarity(lambda texts: torch.tensor(embed(texts)), lambda row: row["text"], batch_size=4),
        EmbeddingSimilarity(SimpleNamespace(encode=embed), "text", train_vectors=VECTORS["train_vectors"]),
        EmbeddingSimilarity(**VECTORS),
        EmbeddingSimilarity(**{name: torch.tensor(rows) for name, rows in VECTORS.items()}),
    ],
)
def test_cosines_however_the_embeddings_come(similarity: EmbeddingSimilarity) -> None:
    found = similarity.score(QUERIES, DataLoader(POOL, batch_size=2))
    torch.testing.assert_close(found.values, torch.tensor(EXPECTED, dtype=torch.float64))
    assert (found.query_ids, found.train_ids) == ((0, 1), tuple(range(6)))
    assert (found.formula, found.reduction) == ("cosine of embeddings", "no loss")
    part = similarity.score(QUERIES, ExampleLoader(POOL, indices=[4, 1]))
    assert part.train_ids == (4, 1)
    torch.testing.assert_close(part.values, found.values[:, [4, 1]])


def test_it_is_what_the_filter_finds() -> None:
    by_filter = Lexical(KNNFilter(VECTORS["train_vectors"]), lambda row: embed([row["text"]])[0])
    torch.testing.assert_close(
        EmbeddingSimilarity(embed, "text").score(QUERIES, POOL).values, by_filter.score(QUERIES, POOL).values
    )


def test_unit_vectors() -> None:
    vectors = EmbeddingSimilarity(embed, "text").represent(POOL)
    torch.testing.assert_close(vectors.norm(dim=1), torch.tensor([1.0] * 5 + [0.0], dtype=torch.float64))
    with pytest.raises(ValueError, match=r"expected embed=; the vectors given are at hand"):
        EmbeddingSimilarity(**VECTORS).represent(POOL)


def broken(texts: list[str]) -> np.ndarray:
    return np.where(np.array(texts)[:, None] == "a dog ran", np.nan, embed(texts))


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, "`EmbeddingSimilarity(train_vectors=None)`: expected vectors [N, d], or embed= to make them."),
    "one side": ({"train_vectors": VECTORS["train_vectors"]}, "`EmbeddingSimilarity(query_vectors=None)`: expected"),
    "no text": ({"embed": embed}, "text=None)`: expected a field of the rows, or a function of a row"),
    "no function": ({"embed": 3, "text": "text"}, "expected a function of a list of rows"),
    "rows": (
        {**VECTORS, "train_vectors": VECTORS["train_vectors"][:5]},
        "`EmbeddingSimilarity(train_vectors)`: expected one embedding for each of the 6 rows of the data, got 5.",
    ),
    "width": (
        {**VECTORS, "query_vectors": VECTORS["query_vectors"][:, :2]},
        "the embeddings of the queries have 2 numbers, those of the training examples 3.",
    ),
    "NaN given": (
        {**VECTORS, "train_vectors": broken([row["text"] for row in POOL])},
        "expected finite embeddings of norms below 1e+37, not so row 2.",
    ),
    "NaN made": ({"embed": broken, "text": "text"}, "not so row 2."),
    "field": ({"embed": embed, "text": "words"}, "row 0 has the fields ['text']"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    arguments, message = BAD[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        EmbeddingSimilarity(**arguments).score(QUERIES, POOL)
