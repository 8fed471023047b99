from __future__ import annotations

import numpy as np
import pytest
import torch
from tqdm import tqdm

from lightning_influence.filters.embeddings import as_matrix, embedded, embedding_function, finite_norms


def sizes(batch):
    return torch.tensor([[float(item), 1.0] for item in batch], requires_grad=True) * 2


def test_rows_are_embedded_in_batches_without_gradients():
    seen = []

    def embed(batch):
        values = sizes(batch)
        seen.append((batch, values.requires_grad))
        return values

    rows, norms = embedded("F(corpus)", range(5), embed, batch_size=2, progress=False)
    assert seen == [([0, 1], False), ([2, 3], False), ([4], False)]
    assert rows.tolist() == [[0, 2], [2, 2], [4, 2], [6, 2], [8, 2]]
    np.testing.assert_allclose(norms, np.linalg.norm(rows.astype(np.float64), axis=1), rtol=1e-15)


def test_precomputed_rows_are_not_copied():
    given = np.ones((3, 2), dtype=np.float32)
    rows, norms = embedded("F(corpus)", given, None, batch_size=2, progress=False)
    assert np.shares_memory(rows, given)
    assert norms.tolist() == [2**0.5] * 3


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([[1, 2], [3, 4]], np.float64),
        (((1.0, 2.0), (3.0, 4.0)), np.float64),
        (np.array([[1, 2], [3, 4]], dtype=np.float16), np.float32),
        (np.array([[1, 3], [2, 4]], dtype=np.float32).T, np.float32),
        (torch.tensor([[1, 2], [3, 4]]), np.float64),
        (torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.bfloat16), np.float32),
        (torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64, requires_grad=True), np.float64),
        ([torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])], np.float32),
        ([np.array([1.0, 2.0]), np.array([3.0, 4.0])], np.float64),
    ],
)
def test_what_counts_as_embeddings(values, dtype):
    rows = as_matrix("F(corpus)", values, first=0, expected=2)
    assert rows.dtype == dtype
    assert rows.flags.c_contiguous
    assert rows.tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    ("values", "got"),
    [
        (np.ones((2, 2)), r"float64 \[2, 2\]"),
        (np.ones(3), r"float64 \[3\]"),
        (np.ones((3, 0)), r"float64 \[3, 0\]"),
        (np.ones((3, 2, 2)), r"float64 \[3, 2, 2\]"),
        (np.ones((3, 2), dtype=complex), r"complex128 \[3, 2\]"),
        ([[1.0], [1.0, 2.0], [1.0]], r"object \[0\]"),
        (["a", "b", "c"], r"<U1 \[3\]\. Texts need an `embed`"),
        (None, r"object \[\]"),
    ],
)
def test_what_does_not(values, got):
    with pytest.raises(ValueError, match=rf"`F\(corpus\)`: expected numbers \[3, d\], .* the rows 6 to 8, got {got}"):
        as_matrix("F(corpus)", values, first=6, expected=3)


def test_tensors_of_different_widths():
    with pytest.raises(ValueError, match=r"expected numbers \[2, d\]"):
        as_matrix("F(corpus)", [torch.ones(2), torch.ones(3)], first=0, expected=2)


def test_batches_of_different_widths():
    with pytest.raises(ValueError, match="expected embeddings of one width, got 2 for row 0 and 1 for row 2"):
        embedded("F(corpus)", range(3), lambda batch: np.ones((len(batch), len(batch))), 2, progress=False)


def test_rows_that_are_not_finite_stop_the_first_batch_that_has_them():
    asked = []

    def embed(batch):
        asked.extend(batch)
        return np.array([[np.nan if item in (2, 3) else 1.0] for item in batch])

    with pytest.raises(ValueError, match=r"`F\(corpus\)`: expected finite .* below 1e\+37, not so row 2, 3\."):
        embedded("F(corpus)", range(9), embed, 2, progress=False)
    assert asked == [0, 1, 2, 3]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
def test_norms_are_finite(bad, monkeypatch):
    monkeypatch.setattr("lightning_influence.filters.embeddings.CHUNK", 4)
    rows = np.ones((7, 2), dtype=np.float32)
    assert finite_norms("F", rows).tolist() == [2**0.5] * 7
    rows[[1, 6], 1] = bad
    with pytest.raises(ValueError, match="not so row 1, 6"):
        finite_norms("F", rows)


def test_encode_goes_first():
    class Model:
        def encode(self, rows):
            return "encoded"

        def __call__(self, rows):
            return "called"

    assert embedding_function(Model())([]) == "encoded"
    assert embedding_function(len) is len
    assert embedding_function(None) is None


def test_a_long_embedding_shows_a_bar_unless_told_not_to(monkeypatch, capsys):
    monkeypatch.setattr(
        "lightning_influence.filters.embeddings.tqdm", lambda rows, **options: tqdm(rows, **{**options, "delay": 0})
    )
    embedded("F", range(3), sizes, 1, progress=False)
    assert capsys.readouterr().err == ""
    embedded("F", range(3), sizes, 1, progress=True)
    assert "embedding" in capsys.readouterr().err
