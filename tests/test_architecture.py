"""The rules of the house that a reader of one file cannot see: who may import whom, what a file may hold."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "lightning_influence"
TESTS = ROOT / "tests"

# A module imports from an earlier stage or from its own; stages on one line do not know each other.
STAGES = (
    ("errors",),
    ("capture", "filters", "metrics"),
    ("projections",),
    ("curvature",),
    ("store",),
    ("estimators",),
    ("selection",),
    ("evaluation",),
    ("report",),
    ("callbacks", "datamodule"),
    ("cli",),
)
RANK = {stage: rank for rank, stages in enumerate(STAGES) for stage in stages}
TRAINER_STAGES = {"callbacks", "datamodule", "cli"}
TRAINERS = {"lightning", "pytorch_lightning", "lightning_fabric"}
PICKLES = {"pickle", "cloudpickle", "dill", "joblib", "shelve"}
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 40


def python_files(*folders: Path) -> list[Path]:
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


PACKAGE_FILES = python_files(PACKAGE)
ALL_FILES = python_files(PACKAGE, TESTS, ROOT / "examples")


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def stage_of(path: Path) -> str | None:
    """`curvature` of `lightning_influence/curvature/ekfac.py`; None of the root `__init__.py`."""
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return None if first == "__init__" else first


def imported_names(path: Path) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of everything imported anywhere in a file, `from x import y` as `x.y`."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*parents, *([node.module] if node.module else [])))
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def length_without_docstring(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


def stage_problem(own: str, imported: str) -> str | None:
    """Why a module of stage `own` may not import the dotted name `imported`, or None when it may."""
    package, _, rest = imported.partition(".")
    other = rest.split(".")[0]
    if package != PACKAGE.name or other == own:
        return None
    if other not in RANK:
        return "imports from the root of the package; expected the module that defines it"
    return None if RANK[other] < RANK[own] else f"{other} is not before {own} in the order of the stages"


def test_every_module_belongs_to_a_stage():
    unknown = {name(path) for path in PACKAGE_FILES if stage_of(path) not in {None, *RANK}}
    assert not unknown, f"give these a place in STAGES: {sorted(unknown)}"


@pytest.mark.parametrize("path", PACKAGE_FILES, ids=name)
def test_imports_go_upstream(path):
    own = stage_of(path)
    if own is None:  # the root lists the public names of every stage
        return
    problems = [(line, what, stage_problem(own, what)) for line, what in imported_names(path)]
    assert not [problem for problem in problems if problem[2]]


@pytest.mark.parametrize("path", PACKAGE_FILES, ids=name)
def test_lightning_stays_outside(path):
    if stage_of(path) in {None, *TRAINER_STAGES}:
        return
    found = [(line, what) for line, what in imported_names(path) if what.split(".")[0] in TRAINERS]
    assert not found, f"Lightning is imported only in {sorted(TRAINER_STAGES)}"


@pytest.mark.parametrize("path", ALL_FILES, ids=name)
def test_files_and_functions_are_short(path):
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_FILE_LINES, "what second thing is hiding in this file?"
    functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    long = {f.name: length_without_docstring(f) for f in functions}
    assert not {f: lines for f, lines in long.items() if lines > MAX_FUNCTION_LINES}


FAMILY_MODULES = [path for path in PACKAGE_FILES if path.parent != PACKAGE and path.name != "__init__.py"]


@pytest.mark.parametrize("path", FAMILY_MODULES, ids=name)
def test_every_member_of_a_family_has_its_tests(path):
    mirror = TESTS / path.relative_to(PACKAGE).with_name(f"test_{path.name}")
    assert mirror.exists(), f"expected the tests of {name(path)} in {name(mirror)}"


def test_every_folder_of_tests_is_a_package():
    """So that files of the same name in two folders are two modules."""
    assert not {name(path.parent) for path in python_files(TESTS) if not (path.parent / "__init__.py").exists()}


@pytest.mark.parametrize("path", ALL_FILES, ids=name)
def test_nothing_read_from_disk_can_run_code(path):
    pickled = [(line, what) for line, what in imported_names(path) if what.split(".")[0] in PICKLES]
    assert not pickled
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    assert not [call.lineno for call in calls if loads_pickles(call)]


def loads_pickles(call: ast.Call) -> bool:
    """`torch.load` without `weights_only=True`, or `numpy.load` with `allow_pickle=True`."""
    if not (isinstance(call.func, ast.Attribute) and isinstance(call.func.value, ast.Name)):
        return False
    keywords = {k.arg: k.value.value for k in call.keywords if isinstance(k.value, ast.Constant)}
    if (call.func.value.id, call.func.attr) == ("torch", "load"):
        return keywords.get("weights_only") is not True
    return call.func.attr == "load" and keywords.get("allow_pickle") is True


def test_oracles_know_nothing_of_the_package():
    oracles = TESTS / "oracles.py"
    found = [what for _, what in imported_names(oracles)] if oracles.exists() else []
    assert not [what for what in found if what.split(".")[0] in {PACKAGE.name, "tests"}]


@pytest.mark.parametrize(
    ("own", "imported", "allowed"),
    [
        ("curvature", "lightning_influence.capture.record.LayerRecord", True),
        ("curvature", "lightning_influence.curvature.base.Curvature", True),
        ("curvature", "torch.nn", True),
        ("capture", "lightning_influence.curvature.base.Curvature", False),
        ("capture", "lightning_influence.metrics.class_entropy", False),
        ("store", "lightning_influence.estimators.scores.Scores", False),
        ("report", "lightning_influence.EKFAC", False),
    ],
)
def test_the_order_itself(own, imported, allowed):
    assert (stage_problem(own, imported) is None) == allowed


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("torch.load(p)", True),
        ("torch.load(p, weights_only=False)", True),
        ("torch.load(p, weights_only=True)", False),
        ("numpy.load(p, allow_pickle=True)", True),
        ("numpy.load(p)", False),
    ],
)
def test_the_search_for_pickles_itself(source, found):
    assert loads_pickles(ast.parse(source).body[0].value) == found


def test_relative_imports_are_resolved(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    path = tmp_path / "lightning_influence" / "curvature" / "ekfac.py"
    path.parent.mkdir(parents=True)
    path.write_text("from ..capture.record import LayerRecord\nfrom . import base\nfrom .. import errors\n")
    assert [what for _, what in imported_names(path)] == [
        "lightning_influence.capture.record.LayerRecord",
        "lightning_influence.curvature.base",
        "lightning_influence.errors",
    ]
