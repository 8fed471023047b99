from __future__ import annotations

import pytest

from lightning_influence.errors import StoreError
from lightning_influence.store import files
from lightning_influence.store.directory import Directory


@pytest.fixture
def directory(tmp_path):
    directory = Directory(tmp_path)
    directory.begin({"format_version": 1})
    return directory


def write(directory, name, value):
    directory.make_room("json", name)
    files.write_json(directory.path / f"{name}.json", value)
    directory.commit("json", name, {}, [f"{name}.json"])


def test_only_what_the_manifest_lists_counts(directory):
    files.write_json(directory.path / "a.json", 1)
    with pytest.raises(StoreError, match=r"has no json 'a'. Expected one of \[\]"):
        directory.entry("json", "a")
    directory.commit("json", "a", {"note": 1}, ["a.json"])
    assert directory.entry("json", "a") == {"note": 1, "files": ["a.json"]}
    assert files.read_json(directory.checked("a.json")) == 1


def test_commits_add_files(directory):
    for name in ("b", "a"):
        files.write_json(directory.path / f"{name}.json", 1)
        directory.commit("rows", "t", {}, [f"{name}.json"])
    assert directory.entry("rows", "t")["files"] == ["a.json", "b.json"]


def test_what_is_replaced_is_missing_in_between_and_never_wrong(directory):
    write(directory, "a", 1)
    directory.make_room("json", "a")
    assert directory.manifest["json"] == {}
    assert directory.manifest["files"] == {}
    assert not (directory.path / "a.json").exists()
    write(directory, "a", 2)
    assert files.read_json(directory.checked("a.json")) == 2


def test_objects_take_turns(directory):
    other = Directory(directory.path)
    write(directory, "a", 1)
    write(other, "b", 2)
    write(directory, "c", 3)
    assert sorted(other.manifest["json"]) == ["a", "b", "c"]


@pytest.mark.parametrize("name", ["", "..", "../a", "a/b", ".hidden", "a b", "manifest"])
def test_names_are_names_of_files(directory, name):
    with pytest.raises(ValueError, match="as a name in a store: expected letters, digits"):
        directory.make_room("json", name)


def test_no_manifest(tmp_path):
    with pytest.raises(StoreError, match=r"has no manifest.json. Expected the directory of a recording"):
        _ = Directory(tmp_path / "nowhere").manifest


def test_damaged_manifest(directory):
    (directory.path / "manifest.json").write_text("{")
    with pytest.raises(StoreError, match=r"manifest.json is damaged: .*Restore it, or record again"):
        _ = directory.manifest


def test_a_manifest_that_is_no_mapping(directory):
    (directory.path / "manifest.json").write_text("[]")
    with pytest.raises(StoreError, match=r"manifest.json is damaged: it is no mapping. Restore it, or record again"):
        _ = directory.manifest
