from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from lightning_influence.errors import StoreError
from lightning_influence.store import files


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, [1])

    def fail(partial):
        partial.write_text("[")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.replace_file(path, fail)
    assert files.read_json(path) == [1]
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_what_a_killed_run_left_is_overwritten(tmp_path):
    (tmp_path / ".a.json.partial").write_text("[[[[[[[[[[[")
    files.write_json(tmp_path / "a.json", {"b": 1, "a": "é"})
    assert files.read_json(tmp_path / "a.json") == {"a": "é", "b": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("value", [float("nan"), {1, 2}, torch.zeros(1), {"a": object()}])
def test_only_plain_json(value):
    with pytest.raises(ValueError, match=r"`f\(\)`: expected plain JSON values"):
        files.as_json(value, "f()")


def test_tensors_of_any_layout_come_back(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "whole": base,
        "transposed": base.t(),
        "slice": base[:, 1:3],
        "expanded": base[0].expand(2, 4),
        "half": base.bfloat16(),
        "double": base.double(),
        "long": torch.tensor([1, 2]),
        "bool": torch.tensor([True]),
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 2),
    }
    files.write_tensors(tmp_path / "t.safetensors", tensors)
    back = load_file(tmp_path / "t.safetensors")
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor)


@given(sizes=st.lists(st.integers(0, 5), max_size=8), limit=st.integers(1, 40))
def test_shards_keep_everything_in_order_and_under_the_limit(sizes, limit):
    tensors = {f"t{i}": torch.zeros(size) for i, size in enumerate(sizes)}
    pieces = list(files.shards(tensors, limit))
    assert [name for piece in pieces for name in piece] == list(tensors)
    assert all(len(p) == 1 or sum(t.nbytes for t in p.values()) <= limit for p in pieces)


def test_a_changed_file_is_named(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, [1])
    expected = files.checksum(path)
    assert files.check_file(path, expected) == path
    path.write_text("[2]\n")
    with pytest.raises(StoreError, match=r"a.json is damaged: sha256 \w{12}... stored, \w{12}... found"):
        files.check_file(path, expected)
    path.unlink()
    with pytest.raises(StoreError, match=r"a.json is missing. Restore the file, or record again"):
        files.check_file(path, expected)


def test_one_dtype_can_be_narrowed_and_counts_are_left_alone():
    tensors = {"a": torch.tensor([1.0, 1 / 3]), "n": torch.tensor([70_001])}
    found, dtypes = files.narrowed(tensors, "bfloat16", "write(x)")
    assert dtypes == {"float32": "bfloat16"}
    assert found["a"].dtype == torch.bfloat16
    back = files.widened(found, dtypes, "x")
    assert torch.equal(back["n"], tensors["n"])
    torch.testing.assert_close(back["a"], tensors["a"], rtol=2.0**-8, atol=0)
    assert files.widened(tensors, None, "x").keys() == tensors.keys()
    with pytest.raises(ValueError, match=r"there are tensors of \['float32', 'float64'\]; expected one dtype"):
        files.narrowed({**tensors, "b": torch.zeros(1).double()}, "bfloat16", "write(x)")
