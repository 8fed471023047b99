from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import TensorDataset

from lightning_influence.capture.component import find_components
from lightning_influence.curvature import CURVATURES, EKFAC, Identity
from lightning_influence.errors import NotFittedError, StoreError
from lightning_influence.estimators.influence_function import InfluenceFunction
from lightning_influence.store import Store, files, model_fingerprint

SETTINGS = {"reduction": "sum", "seed": 0, "dtype": "float32", "select": ("0", "2")}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).eval()


@pytest.fixture
def data():
    torch.manual_seed(1)
    return TensorDataset(torch.randn(12, 3), torch.randint(2, (12,)))


@pytest.fixture
def store(tmp_path, model):
    return Store.create(tmp_path / "store", model, find_components(model), **SETTINGS)


def test_a_store_describes_itself(store, model):
    opened = Store.open(store.path)
    assert repr(opened) == f"Store({str(store.path)!r})"
    assert opened.components == find_components(model)
    assert opened.settings == {**SETTINGS, "select": ["0", "2"]}
    assert opened.manifest["model"] == model_fingerprint(model)
    assert opened.manifest["packages"]["torch"]
    assert opened.contents == {"curvature": [], "rows": [], "scores": [], "json": []}


def test_create_does_not_overwrite(store, model):
    with pytest.raises(StoreError, match=r"there is a recording already.*use Store.resume to go on"):
        Store.create(store.path, model, [])


def test_open_needs_a_recording_of_this_format(store):
    with pytest.raises(StoreError, match=r"has no manifest.json. Expected the directory of a recording"):
        Store.open(store.path / "nowhere")
    manifest = store.path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format_version": 1', '"format_version": 99'))
    with pytest.raises(StoreError, match=r"expected format version 1, found 99, written by .*record again"):
        Store.open(store.path)


def test_settings_are_plain_json(tmp_path, model):
    with pytest.raises(ValueError, match=r"`Store.create\(\*\*settings\)`: expected plain JSON values"):
        Store.create(tmp_path, model, [], loss=nn.CrossEntropyLoss())
    assert not (tmp_path / "manifest.json").exists()


def test_resume_begins_or_goes_on(tmp_path, model):
    path, components = tmp_path / "a", find_components(model)
    Store.resume(path, model, components, seed=0).write_json("note", 1)
    assert Store.resume(path, model, components, seed=0).read_json("note") == 1
    with pytest.raises(StoreError, match="setting 'seed': stored 0, asked 1"):
        Store.resume(path, model, components, seed=1)


def test_verify_accepts_what_was_recorded(store, model):
    store.verify()
    store.verify(model=model.train(), components=find_components(model), **SETTINGS)


def test_verify_names_every_difference(store, model):
    other = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Identity(), nn.Linear(5, 2))
    with pytest.raises(StoreError) as caught:
        store.verify(other, find_components(other), seed=3, reduction="sum", damping=0.1)
    stored, asked = model_fingerprint(model)[:12], model_fingerprint(other)[:12]
    assert str(caught.value) == (
        f"{store!r} does not fit:\n"
        f"- model fingerprint {stored}... != {asked}...: the store belongs to other weights\n"
        "- component '3': asked for, but not in the store\n"
        "- component '2': in the store, but not asked for\n"
        "- component '0', shape: stored [4, 4], asked [5, 4]\n"
        "- setting 'seed': stored 0, asked 3\n"
        "- setting 'damping': not stored, asked 0.1\n"
        "Expected the model, components and settings it was recorded with; record again into another directory "
        "otherwise."
    )


@pytest.mark.parametrize("kind", sorted(CURVATURES))
def test_every_curvature_comes_back(store, model, data, kind):
    inputs, targets = data.tensors
    fitted = CURVATURES[kind]().fit(model.double(), TensorDataset(inputs.double(), targets), batch_size=4)
    store.write_curvature("c", fitted, num_examples=12)
    read = Store.open(store.path).read_curvature("c", find_components(model))
    assert type(read) is type(fitted)
    assert read.settings() == fitted.settings()
    assert read.components == fitted.components
    for component in fitted.components:
        gradients = torch.randn(3, *component.shape, dtype=torch.float64)
        # the bits are the same, their layout in memory need not be
        torch.testing.assert_close(read.solve(component, gradients), fitted.solve(component, gradients))
    assert read.state().keys() == fitted.state().keys()
    assert all(torch.equal(read.state()[name], tensor) for name, tensor in fitted.state().items())
    assert store.manifest["curvature"]["c"]["meta"] == {"num_examples": 12}


def test_curvature_is_cut_into_files(store, model, data):
    fitted = EKFAC().fit(model, data, batch_size=4)
    store.write_curvature("small", fitted, max_shard_bytes=1)
    store.write_curvature("large", fitted)
    count = len(fitted.state())
    assert len(store.manifest["curvature"]["small"]["files"]) == count > 1
    assert len(store.manifest["curvature"]["large"]["files"]) == 1
    read = store.read_curvature("small").state()
    assert all(torch.equal(read[name], tensor) for name, tensor in fitted.state().items())
    store.write_curvature("small", fitted)
    assert [p.name for p in (store.path / "factors/small").iterdir()] == ["00000.safetensors"]


def test_curvature_that_cannot_be_kept(store, model, data):
    with pytest.raises(NotFittedError, match=r"`write_curvature\('c'\)`: EKFAC has not seen its data yet"):
        store.write_curvature("c", EKFAC())

    class Private(Identity):
        pass

    with pytest.raises(ValueError, match=r"Private could not be read back, expected one of .*CURVATURES"):
        store.write_curvature("c", Private().fit(model, data))
    other = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(StoreError, match=r"component '0', shape: stored \[4, 4\], asked \[2, 4\]"):
        store.write_curvature("c", EKFAC().fit(other, data, batch_size=4))


def test_curvature_that_cannot_be_read(store, model, data, monkeypatch):
    store.write_curvature("c", EKFAC().fit(model, data, batch_size=4))
    with pytest.raises(StoreError, match=r"has no curvature 'd'. Expected one of \['c'\]"):
        store.read_curvature("d")
    with pytest.raises(StoreError, match=r"component '2': in the store, but not asked for"):
        store.read_curvature("c", find_components(model)[:1])
    with monkeypatch.context() as patch:
        patch.delitem(CURVATURES, "EKFAC")
        with pytest.raises(StoreError, match=r"curvature 'c' is a EKFAC, expected one of"):
            store.read_curvature("c")
    file = store.path / "factors/c/00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(StoreError, match=r"factors/c/00000.safetensors is damaged"):
        store.read_curvature("c")


def test_scores_come_back(store):
    values = torch.randn(2, 3, 4)
    store.write_scores("if", values, "abc", torch.arange(4), ["0", "2"], formula="IF", damping=0.1)
    read = Store.open(store.path).read_scores("if")
    assert torch.equal(read.values, values)
    assert (read.query_ids, read.train_ids, read.components) == (("a", "b", "c"), (0, 1, 2, 3), ("0", "2"))
    assert read.meta == {"formula": "IF", "damping": 0.1}
    assert store.manifest["scores"]["if"]["shape"] == [2, 3, 4]
    with pytest.raises(StoreError, match=r"has no scores 'dot'. Expected one of \['if'\]"):
        store.read_scores("dot")


def test_scores_that_do_not_fit(store):
    with pytest.raises(ValueError, match=r"`write_scores\('s', train_ids=...\)`: expected every id once"):
        store.write_scores("s", torch.zeros(1, 2), [0], [1, 1])
    with pytest.raises(ValueError, match=r"`write_scores\('s'\)`: expected values of shape"):
        store.write_scores("s", torch.zeros(1, 2), [0], [1])
    assert store.contents["scores"] == []


def test_json_comes_back_and_is_replaced(store):
    store.write_json("selection", {"ids": (1, 2), "bound": None})
    assert store.read_json("selection") == {"ids": [1, 2], "bound": None}
    store.write_json("selection", [])
    assert Store.open(store.path).read_json("selection") == []
    with pytest.raises(ValueError, match=r"`write_json\('selection'\)`: expected plain JSON"):
        store.write_json("selection", torch.zeros(1))
    with pytest.raises(ValueError, match=r"as a name in a store"):
        store.write_json("manifest", {})


def test_rows_know_what_is_missing(store):
    ids = ["a", "b", "c", "d", "e"]
    assert store.missing_ids("g", ids) == tuple(ids)
    store.row_writer("g", ids, shard_rows=2).write(["c", "a", "d"], {"0": torch.randn(3, 4)})
    assert store.missing_ids("g", ["e", "d", "a", "z"]) == ("e", "a", "z")
    writer = store.row_writer("g", ids, shard_rows=2)
    writer.write(writer.missing_ids, {"0": torch.randn(3, 4)})
    assert store.missing_ids("g", ids) == ()
    assert [rows.ids for rows in store.read_rows("g")] == [("a", "b"), ("c", "d"), ("e",)]


def test_rows_are_resumed_with_the_same_plan(store):
    store.row_writer("g", range(5), shard_rows=2)
    with pytest.raises(StoreError, match=r"1 only in the store \[4\].*\n- shard_rows of rows 'g': stored 2"):
        store.row_writer("g", range(4), shard_rows=3)
    with pytest.raises(ValueError, match=r"`row_writer\('g', shard_rows=0\)`: expected an int >= 1"):
        store.row_writer("g", range(5), shard_rows=0)
    with pytest.raises(StoreError, match=r"has no rows 'h'"):
        list(store.read_rows("h"))


def run(source, *arguments):
    command = [sys.executable, "-c", source, *map(str, arguments)]
    root = Path(__file__).resolve().parents[2]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120, check=False)


READER = """
import sys, torch
from lightning_influence.store import Store
store = Store.open(sys.argv[1])
curvature = store.read_curvature("c")
print([c.name for c in store.components], store.contents)
print(curvature.solve(store.components[0], torch.ones(1, 4, 4)).sum().item().hex())
print(store.read_scores("s").values.tolist())
"""


def test_a_process_that_never_saw_the_training_reads_it(store, model, data):
    store.write_curvature("c", EKFAC().fit(model, data, batch_size=4))
    curvature = store.read_curvature("c")
    store.write_scores("s", torch.tensor([[0.5, -1.0]]), ["q"], [3, 4])
    solved = curvature.solve(store.components[0], torch.ones(1, 4, 4)).sum().item().hex()
    done = run(READER, store.path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "['0', '2'] {'curvature': ['c'], 'rows': [], 'scores': ['s'], 'json': []}",
        solved,
        "[[0.5, -1.0]]",
    ]


WRITER = """
import os, sys, torch
from lightning_influence.store import Store
writer = Store.open(sys.argv[1]).row_writer("g", range(8), shard_rows=2)
rename = os.replace
def dying(source, target):
    if str(target).endswith("00002.safetensors"):
        os._exit(9)
    rename(source, target)
os.replace = dying
for id_ in writer.missing_ids:
    writer.write([id_], {"0": torch.full((1, 3), float(id_))})
"""


def test_a_process_that_was_killed_is_taken_up_by_another(store, model):
    whole = Store.create(store.path.parent / "whole", model, find_components(model), **SETTINGS)
    writer = whole.row_writer("g", range(8), shard_rows=2)
    writer.write(range(8), {"0": torch.arange(8.0)[:, None].expand(8, 3)})
    assert run(WRITER, store.path).returncode == 9
    assert store.missing_ids("g", range(8)) == (4, 5, 6, 7)
    assert (store.path / "rows/g/.00002.safetensors.partial").exists()
    writer = store.row_writer("g", range(8), shard_rows=2)
    writer.write(writer.missing_ids, {"0": torch.arange(4.0, 8.0)[:, None].expand(4, 3)})
    pairs = [{p.relative_to(s.path): p.read_bytes() for p in s.path.rglob("*.*")} for s in (store, whole)]
    assert pairs[0] == pairs[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_factors_in_half_the_room(store, model, data, dtype):
    """bfloat16 has 8 bits: every number within 2^-9, a solution within some of these."""
    rows = [(x.to(dtype), y) for x, y in data]
    curvature = EKFAC().fit(model.to(dtype), rows)
    half = Store.create(store.path / "half", model, find_components(model))
    half.write_curvature("c", curvature, dtype="bfloat16")
    half.write_curvature("whole", curvature)
    entries = half.manifest["curvature"]
    assert entries["c"]["dtype"] == {str(dtype).removeprefix("torch."): "bfloat16"}
    assert entries["whole"]["dtype"] == {}
    sizes = {n: sum(half.manifest["files"][path]["bytes"] for path in entries[n]["files"]) for n in entries}
    assert sizes["c"] < sizes["whole"]
    found = Store.open(half.path).read_curvature("c")
    assert all(tensor.dtype == dtype for tensor in found.state().values())
    for component in curvature.components:
        gradients = torch.randn(5, *component.shape, dtype=dtype)
        expected = curvature.solve(component, gradients)
        assert (found.solve(component, gradients) - expected).norm() < 0.03 * expected.norm()


def test_a_dtype_that_is_not_what_the_manifest_says_is_refused(store, model, data):
    store.write_curvature("c", EKFAC().fit(model, data))
    path = store.path / "manifest.json"
    path.write_text(path.read_text().replace('"dtype": {}', '"dtype": {"float32": "bfloat16"}'))
    with pytest.raises(StoreError, match=r"the manifest says bfloat16, the files hold \['float32'\]. Record again"):
        store.read_curvature("c")


def test_a_dtype_to_store_in_is_checked(store, model, data):
    curvature = EKFAC().fit(model, data)
    with pytest.raises(ValueError, match=r"dtype='float16'\)`: expected 'bfloat16', or None to keep all digits"):
        store.write_curvature("c", curvature, dtype="float16")


def test_examples_that_were_left_out_are_told(store, model, data):
    curvature = EKFAC().fit(model, data)
    curvature.omitted = (3, 5)
    store.write_curvature("c", curvature)
    assert store.manifest["curvature"]["c"]["omitted"] == [3, 5]
    assert store.read_curvature("c").omitted == (3, 5)


def edit(store, change):
    path = store.path / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_manifest_without_its_groups_is_damaged(store):
    edit(store, lambda content: content.pop("curvature"))
    with pytest.raises(StoreError, match=r"manifest.json is damaged: it lacks \['curvature'\]. Restore it"):
        Store.open(store.path)


def test_settings_of_a_later_version_are_refused(store, model, data):
    store.write_curvature("c", EKFAC().fit(model, data))
    edit(store, lambda content: content["curvature"]["c"]["settings"].update(later=1))
    with pytest.raises(StoreError, match=r"settings that this version does not know \(.*'later'\); written by .*torch"):
        store.read_curvature("c")


def test_a_curvature_of_an_earlier_version_is_read(store, model, data):
    """Before factors could be in pieces, subsampled, narrowed or without some examples."""
    curvature = EKFAC(damping=0.1).fit(model, data)
    store.write_curvature("c", curvature)
    path = store.path / store.manifest["curvature"]["c"]["files"][0]
    old = {key.removesuffix(".0"): value.clone() for key, value in load_file(path).items()}
    files.write_tensors(path, old)

    def change(content):
        entry = content["curvature"]["c"]
        entry["settings"] = {key: entry["settings"][key] for key in ("damping", "damping_share", "fisher", "seed")}
        del entry["dtype"], entry["omitted"]
        content["files"][entry["files"][0]]["sha256"] = files.checksum(path)

    edit(store, change)
    found = InfluenceFunction.from_store(model, store.path, "c").score(data, data).values
    assert any(key.endswith(".0") for key in curvature.state())
    assert torch.equal(found, InfluenceFunction(model, curvature).score(data, data).values)


@pytest.mark.parametrize("part", ["factors/c/00000.safetensors", "manifest.json"])
def test_a_store_cut_in_half_is_damaged(store, model, data, part):
    store.write_curvature("c", EKFAC(damping=0.1).fit(model, data))
    whole = (store.path / part).read_bytes()
    (store.path / part).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StoreError, match=r"is damaged: .* record again"):
        InfluenceFunction.from_store(model, store.path, "c")
