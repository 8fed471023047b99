from __future__ import annotations

import os
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_influence.errors import StoreError
from lightning_influence.store.directory import Directory
from lightning_influence.store.rows import RowTable, RowWriter

IDS = tuple(range(100, 111))


def row(id_):
    """Columns of one example, a function of its id, as gradients at fixed weights are."""
    generator = torch.Generator().manual_seed(id_)
    return {
        "fc": torch.randn(2, 3, generator=generator),
        "out": torch.randn(4, generator=generator, dtype=torch.float64),
    }


def batch(ids):
    rows = [row(id_) for id_ in ids]
    return {column: torch.stack([r[column] for r in rows]) for column in rows[0]}


def begin(path, ids=IDS, shard_rows=4):
    directory = Directory(path)
    directory.begin({})
    table = RowTable(directory, "train")
    table.begin(ids, shard_rows, {"dtype": "half"})
    return table


def resume(path):
    """What a later process does: everything that is missing, in batches of 3."""
    writer = RowWriter(RowTable(Directory(path), "train"))
    missing = writer.missing_ids
    for start in range(0, len(missing), 3):
        ids = missing[start : start + 3]
        writer.write(ids, batch(ids))
    return writer


def contents(path):
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}


@pytest.fixture
def uninterrupted(tmp_path):
    begin(tmp_path / "uninterrupted")
    resume(tmp_path / "uninterrupted")
    return contents(tmp_path / "uninterrupted")


def test_rows_come_back(tmp_path):
    table = begin(tmp_path)
    assert resume(tmp_path).missing_ids == ()
    shards = list(table.read())
    assert [shard.ids for shard in shards] == [IDS[:4], IDS[4:8], IDS[8:]]
    for shard in shards:
        expected = batch(shard.ids)
        assert all(torch.equal(shard.values[column], expected[column]) for column in expected)
        assert shard.values["out"].dtype == torch.float64


@given(seed=st.integers(0, 1000), batch_size=st.integers(1, 12), shard_rows=st.integers(1, 12))
def test_order_batching_and_repetition_do_not_matter(tmp_path_factory, seed, batch_size, shard_rows):
    paths = [tmp_path_factory.mktemp("rows") for _ in range(2)]
    begin(paths[0], shard_rows=shard_rows)
    resume(paths[0])
    ids = [*IDS, *IDS[:4]]
    random.Random(seed).shuffle(ids)
    writer = RowWriter(begin(paths[1], shard_rows=shard_rows))
    for start in range(0, len(ids), batch_size):
        part = ids[start : start + batch_size]
        writer.write(part, batch(part))
    assert writer.missing_ids == ()
    assert contents(paths[1]) == contents(paths[0])


@pytest.mark.parametrize("kill_at", range(6))  # 3 shards, and the manifest after each
@pytest.mark.parametrize("renamed", [False, True], ids=["before the rename", "after the rename"])
def test_a_killed_and_resumed_run_ends_with_the_same_bytes(tmp_path, monkeypatch, uninterrupted, kill_at, renamed):
    path = tmp_path / "killed"
    begin(path)
    rename, calls = os.replace, []

    def dying(source, target):
        calls.append(target)
        if len(calls) <= kill_at or renamed:
            rename(source, target)
        if len(calls) > kill_at:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dying)
        with pytest.raises(KeyboardInterrupt):
            resume(path)
    listed = (kill_at + renamed) // 2
    assert RowWriter(RowTable(Directory(path), "train")).missing_ids == IDS[4 * listed :]
    resume(path)
    assert contents(path) == uninterrupted


def test_a_lost_shard_is_computed_again(tmp_path, uninterrupted):
    begin(tmp_path / "lost")
    resume(tmp_path / "lost")
    (tmp_path / "lost/rows/train/00001.safetensors").unlink()
    assert RowWriter(RowTable(Directory(tmp_path / "lost"), "train")).missing_ids == IDS[4:8]
    resume(tmp_path / "lost")
    assert contents(tmp_path / "lost") == uninterrupted


def test_rows_handed_over_may_be_changed_afterwards(tmp_path):
    table = begin(tmp_path, ids=(0, 1), shard_rows=2)
    writer = RowWriter(table)
    buffer = torch.ones(1, 3)
    for id_ in (0, 1):
        buffer.fill_(id_)
        writer.write([id_], {"fc": buffer})
    assert next(table.read()).values["fc"].tolist() == [[0.0] * 3, [1.0] * 3]


def test_ids_may_be_strings_or_a_tensor(tmp_path):
    table = begin(tmp_path / "s", ids=("b", "a"))
    RowWriter(table).write(["a", "b"], {"x": torch.tensor([1.0, 2.0])})
    rows = next(table.read())
    assert (rows.ids, rows.values["x"].tolist()) == (("b", "a"), [2.0, 1.0])
    table = begin(tmp_path / "t", ids=(3, 5))
    RowWriter(table).write(torch.tensor([5, 3]), {"x": torch.tensor([1.0, 2.0])})
    assert next(table.read()).values["x"].tolist() == [2.0, 1.0]


def test_an_incomplete_table_is_not_read(tmp_path):
    table = begin(tmp_path)
    RowWriter(table).write(IDS[:5], batch(IDS[:5]))
    with pytest.raises(StoreError, match=r"lack 7 of 11 ids, the first \[104, 105, .*Go on with `row_writer"):
        next(table.read())


def test_a_damaged_shard_is_named(tmp_path):
    table = begin(tmp_path)
    resume(tmp_path)
    shard = tmp_path / "rows/train/00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x01")
    with pytest.raises(StoreError, match=r"00002.safetensors is damaged"):
        list(table.read())


def test_a_table_without_ids_is_complete(tmp_path):
    assert list(begin(tmp_path, ids=()).read()) == []


@pytest.mark.parametrize(
    ("ids", "values", "message"),
    [
        ([7], {"x": torch.zeros(1)}, r"expected ids of the table, got \[7\] besides"),
        ([100], {"x": torch.zeros(2)}, r"expected 1 rows by column, one an id, got \{'x': 2\}"),
        ([100], {}, r"expected 1 rows by column, one an id, got \{\}"),
        ([101], {"x": torch.zeros(1, 3)}, r"expected the columns written before, .*\[2\].*got .*\[3\]"),
        ([101], {"x": torch.zeros(1, 2).double()}, r"expected the columns written before"),
        ([101], {"y": torch.zeros(1, 2)}, r"expected the columns written before"),
    ],
)
def test_rows_that_do_not_fit(tmp_path, ids, values, message):
    writer = RowWriter(begin(tmp_path, shard_rows=1))
    writer.write([102], {"x": torch.zeros(1, 2)})
    for again in (writer, RowWriter(RowTable(Directory(tmp_path), "train"))):
        with pytest.raises(ValueError, match=message):
            again.write(ids, values)


def test_another_plan_is_named(tmp_path):
    table = begin(tmp_path)
    assert not list(table.plan_differences(IDS, 4, {"dtype": "half"}))
    assert list(table.plan_differences((*IDS[1:], 7, 8), 5, {"dtype": None, "seed": 1})) == [
        "ids of rows 'train': 1 only in the store [100], 2 only asked for [7, 8]",
        "shard_rows of rows 'train': stored 4, asked 5",
        "dtype of rows 'train': stored 'half', asked None",
        "seed of rows 'train': stored None, asked 1",
    ]
    assert list(table.plan_differences(IDS[::-1], 4, {"dtype": "half"})) == [
        "ids of rows 'train': 0 only in the store [], 0 only asked for [], but in another order"
    ]
