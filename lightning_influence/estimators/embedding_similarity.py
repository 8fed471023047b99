"""Cosine of embeddings, by any model or given: the baseline that knows no gradient."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_influence.capture import ExampleLoader
from lightning_influence.estimators.lexical import Text, texts_of
from lightning_influence.estimators.scores import Scores
from lightning_influence.filters.embeddings import embedded, embedding_function


class EmbeddingSimilarity:
    """Cosine of each query's embedding with each training example's, by any embedding (NV-Embed in [IA] section 5).

    Higher is more similar, between -1 and 1; nothing is known of help or harm. In the call shape of the estimators::

        EmbeddingSimilarity(encoder, text="text").score(queries, train)
        EmbeddingSimilarity(train_vectors=array, query_vectors=other).score(queries, train)

    Args:
        embed: A list of rows to their embeddings [b, d], as an array or a tensor, or an object with such a method
            ``encode``, say a model of sentence-transformers. Needed for each side that has no vectors.
        text: What ``embed`` is given of an example: a field of the dataset's rows, or a function of a row.
        train_vectors: Embeddings [N, d] of all rows of the training data, in their order.
        query_vectors: The same of the queries.
        batch_size: Rows in a call of ``embed``.
        progress: Whether to show a progress bar when it takes more than a few seconds.

    Raises:
        ValueError: If ``embed`` cannot be called, has no text to go with, or is missing where vectors are.
    """

    formula = "cosine of embeddings"

    def __init__(
        self,
        embed: Any = None,
        text: Text | None = None,
        *,
        train_vectors: Any = None,
        query_vectors: Any = None,
        batch_size: int = 256,
        progress: bool = True,
    ) -> None:
        if embed is None and (train_vectors is None or query_vectors is None):
            missing = "train_vectors" if train_vectors is None else "query_vectors"
            raise ValueError(f"`EmbeddingSimilarity({missing}=None)`: expected vectors [N, d], or embed= to make them.")
        if embed is not None and not isinstance(text, str) and not callable(text):
            raise ValueError(
                f"`EmbeddingSimilarity(embed=..., text={text!r})`: expected a field of the rows, or a function of a "
                "row: what embed is given of an example."
            )
        self._embed = embedding_function(embed)
        self.text = text
        self.train_vectors = train_vectors
        self.query_vectors = query_vectors
        self.batch_size = batch_size
        self.progress = progress

    def score(self, queries: Any, train: Any) -> Scores:
        """Cosine of every training example with every query, float64 [q, n]; 0 with an embedding of zeros.

        Args:
            queries: Map-style dataset or DataLoader.
            train: Map-style dataset or DataLoader.

        Raises:
            ValueError: If the data is empty, a row has no such text, the vectors are not one for each row, an embedding
                is not finite (rows are named), or the two sides differ in width.
        """
        left, right = ExampleLoader(queries), ExampleLoader(train)
        one = self._vectors("query_vectors", self.query_vectors, left)
        other = self._vectors("train_vectors", self.train_vectors, right)
        if one.shape[1] != other.shape[1]:
            raise ValueError(
                f"`EmbeddingSimilarity.score`: the embeddings of the queries have {one.shape[1]} numbers, those of the "
                f"training examples {other.shape[1]}. Expected both from one model."
            )
        return Scores(one @ other.mT, tuple(left.ids), tuple(right.ids), self.formula, "no loss")

    def represent(self, data: Any) -> Tensor:
        """Embeddings made by ``embed`` of all examples, scaled to length 1, float64 [n, d].

        They are what `RedundancyFilter` and `FacilityLocation` take.

        Raises:
            ValueError: If there is no ``embed``, or as `score`.
        """
        if self._embed is None:
            raise ValueError("`EmbeddingSimilarity.represent(data)`: expected embed=; the vectors given are at hand.")
        return self._vectors("data", None, ExampleLoader(data))

    def _vectors(self, side: str, given: Any, examples: ExampleLoader) -> Tensor:
        call = f"EmbeddingSimilarity({side})"
        if given is None:
            assert self.text is not None
            items = texts_of(examples, self.text, "EmbeddingSimilarity(text=...)")
            rows, norms = embedded(call, items, self._embed, self.batch_size, self.progress)
        else:
            size = len(examples.dataset)  # type: ignore[arg-type]
            if len(given) != size:
                raise ValueError(
                    f"`{call}`: expected one embedding for each of the {size} rows of the data, got {len(given)}."
                )
            rows, norms = embedded(call, given, None, self.batch_size, self.progress)
            rows, norms = rows[examples.ids], norms[examples.ids]
        lengths = np.where(norms > 0, norms, 1.0)
        return torch.from_numpy(rows.astype(np.float64) / lengths[:, None])
