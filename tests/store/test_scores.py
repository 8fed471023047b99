from __future__ import annotations

import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_influence.store import scores as module
from lightning_influence.store.scores import StoredScores, check_scores, read_parquet, write_parquet

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@given(
    shape=st.tuples(st.integers(0, 3), st.integers(1, 4), st.integers(1, 5)),
    dtype=st.sampled_from(DTYPES),
    strings=st.booleans(),
    rows_per_group=st.integers(1, 12),
)
def test_round_trip(tmp_path_factory, shape, dtype, strings, rows_per_group):
    c, q, n = shape
    path = tmp_path_factory.mktemp("scores") / "s.parquet"
    values = torch.randn(*([c] if c else []), q, n).to(dtype)
    values.view(-1)[0] = float("nan")
    scores = StoredScores(
        values,
        query_ids=tuple(f"q{i}" for i in range(q)) if strings else tuple(range(7, 7 + q)),
        train_ids=tuple(range(n, 0, -1)),
        components=tuple(f"layer.{i}" for i in range(c)) or None,
        meta={"formula": "F", "damping": 0.1},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "ROWS_PER_GROUP", rows_per_group)
        write_parquet(path, scores)
    back = read_parquet(path)
    assert back.values.dtype == dtype
    assert torch.equal(back.values.nan_to_num(9.0), values.nan_to_num(9.0))
    assert (back.query_ids, back.train_ids) == (scores.query_ids, scores.train_ids)
    assert (back.components, back.meta) == (scores.components, scores.meta)


def test_the_table_is_long_and_needs_no_explanation(tmp_path):
    values = torch.arange(4.0).reshape(1, 2, 2)
    write_parquet(tmp_path / "s.parquet", StoredScores(values, ("a", "b"), (4, 2), ("fc",)))
    rows = pq.read_table(tmp_path / "s.parquet").to_pylist()
    assert rows[1] == {"component": "fc", "query_id": "a", "train_id": 2, "score": 1.0}
    assert [row["score"] for row in rows] == [0.0, 1.0, 2.0, 3.0]
    write_parquet(tmp_path / "s.parquet", StoredScores(values[0], ("a", "b"), (4, 2)))
    assert pq.read_table(tmp_path / "s.parquet")["component"].null_count == 4


def test_equal_scores_are_equal_bytes(tmp_path):
    scores = StoredScores(torch.randn(3, 4), (0, 1, 2), (0, 1, 2, 3), meta={"b": 1, "a": 2})
    write_parquet(tmp_path / "one", scores)
    write_parquet(tmp_path / "two", scores)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (StoredScores(torch.zeros(2, 3), (0, 1), (0, 1)), r"expected values of shape \[q, n\] = \[2, 2\]"),
        (StoredScores(torch.zeros(1, 2), (0,), (0, 1), ("a",)), r"\[c, q, n\] = \[1, 1, 2\].*got \[1, 2\]"),
        (StoredScores(torch.zeros(0, 2), (), (0, 1)), r"none of them 0.*got \[0, 2\]"),
        (StoredScores(torch.zeros(1, 1, dtype=torch.long), (0,), (0,)), "expected floating-point values"),
    ],
)
def test_values_that_do_not_fit_their_labels(scores, message):
    with pytest.raises(ValueError, match=message):
        check_scores(scores, "write_scores('s')")
