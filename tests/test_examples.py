"""The examples as a user runs them, in their quick form: what they write and what it says."""

from __future__ import annotations

import csv
import json
import logging
import math
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))  # as for a script that runs there

import digits_demo
from digits_report import Estimate, Line, Result, summarise, table, verdict

ROOT = Path(__file__).resolve().parent.parent


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A script of the examples in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "examples" / script), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def digits(out: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    """Results and standard output of the digits demo."""
    done = run("digits_demo.py", *arguments, "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads((out / "results.json").read_text()), done.stdout


def numbers(markdown: str) -> list[list[str]]:
    """Cells of the tables' lines, without heads and rules."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines() if line[:1] == "|"]
    return [row for row in rows if row[0].isdigit()]


def selected(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The quick run, which all tests below look at."""
    out = tmp_path_factory.mktemp("demo")
    results, printed = digits(out, "--quick")
    return out, results, printed


def test_digits_demo_writes_everything(demo):
    out, results, printed = demo
    assert (out / "summary.md").read_text().strip() in printed
    assert (out / "held_out_loss.png").read_bytes().startswith(b"\x89PNG")
    assert {path.suffix for path in (out / "selections").iterdir()} == {".jsonl"}
    assert len(list((out / "selections").iterdir())) == 2 * 2 * 3  # seeds, sizes, methods
    assert results["options"]["noise"] == [0.2]
    assert f"--quick --out {out}" in results["options"]["command"]
    assert results["seconds"] > 0


def test_digits_demo_says_one_number_everywhere(demo):
    """Every network once in the CSV as in the JSON, and the table shows the means of those."""
    out, results, _ = demo
    with (out / "results.csv").open() as file:
        networks = list(csv.DictReader(file))
    assert networks == [{key: str(value) for key, value in network.items()} for network in results["results"]]
    assert len(networks) == 2 * (2 * 3 + 1)
    lines = numbers((out / "summary.md").read_text())
    assert len(lines) == 2 * 3 + 1
    for cells in lines:
        own = [n for n in networks if (n["rows"], n["method"]) == (cells[0], cells[1])]
        mean = sum(float(n["loss"]) for n in own) / len(own)
        assert len(own) == 2
        assert float(cells[2].split()[0]) == pytest.approx(mean, abs=0.0051)


def test_digits_demo_has_sound_numbers(demo):
    _, results, _ = demo
    for network in results["results"]:
        assert all(math.isfinite(network[key]) for key in ("loss", "accuracy", "class_entropy", "wrong"))
        assert 0 < network["accuracy"] < 1
        assert 0 <= network["class_entropy"] <= math.log(10) + 1e-6
    assert [n["wrong"] for n in results["results"] if n["method"] == "whole pool"] == [pytest.approx(0.2)] * 2


def test_interactions_pay_on_digits(demo):
    """The claim of the demo: below additive influence for every seed and size, and not above random rows."""
    _, results, _ = demo
    networks = {(n["seed"], n["rows"], n["method"]): n for n in results["results"]}
    for seed in (0, 1):
        for rows in (50, 100):
            ours, additive, random = (networks[seed, rows, m] for m in ("interaction-aware", "additive", "random"))
            assert ours["loss"] < additive["loss"]
            assert ours["loss"] < random["loss"]
            assert ours["wrong"] < 0.1 < random["wrong"]
            assert ours["class_entropy"] > additive["class_entropy"]


def test_selections_on_disk_are_those_that_were_trained_on(demo):
    out, results, _ = demo
    for network in results["results"]:
        if network["method"] == "whole pool":
            continue
        name = f"noise=0.2-seed={network['seed']}-{network['method']}-{network['rows']}.jsonl"
        rows = selected(out / "selections" / name)
        assert [row["rank"] for row in rows] == list(range(network["rows"]))
        assert len({row["id"] for row in rows}) == len({row["digit"] for row in rows}) == network["rows"]
        assert sum(row["wrong"] for row in rows) / len(rows) == pytest.approx(network["wrong"])
        assert all(row["wrong"] == (row["label"] != row["true_label"]) for row in rows)
        assert all(row["gain"] == pytest.approx(row["first_order"] + row["interaction"]) for row in rows)


@pytest.fixture
def _levels():
    """The demo silences Lightning's loggers; they speak again after the test."""
    loggers = [logging.getLogger(name) for name in digits_demo.LOGGERS]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.mark.usefixtures("_levels")
def test_a_seed_selects_the_same_alone_and_a_pool_can_be_clean(demo, tmp_path):
    """Noise 0.2 again with one size, one seed and hardly any training; noise 0 has no wrong label anywhere."""
    arguments = ["--noise", "0.2", "0", "--seeds", "1", "--sizes", "0.05", "--steps", "20", "--out", str(tmp_path)]
    digits_demo.main(arguments)
    files = sorted((tmp_path / "selections").glob("noise=0.2-seed=0-*-50.jsonl"))
    assert len(files) == 3
    assert all(file.read_text() == (demo[0] / "selections" / file.name).read_text() for file in files)
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert [network["wrong"] for network in results if network["noise"] == 0] == [0.0] * 4
    assert len(numbers((tmp_path / "summary.md").read_text())) == 2 * 4


def test_without_options_both_pools_and_five_seeds():
    full, quick = digits_demo.parse([]), digits_demo.parse(["--quick"])
    assert (full.noise, full.seeds, full.sizes, full.out) == ((0.2, 0.0), 5, (0.05, 0.1, 0.2), Path("runs/demo"))
    assert (quick.noise, quick.seeds, quick.sizes, quick.steps) == ((0.2,), 2, (0.05, 0.1), full.steps)
    assert digits_demo.parse(["--noise", "0"]).noise == (0.0,)


@pytest.mark.parametrize("wrong", [["--noise", "20"], ["--sizes", "0"], ["--seeds", "0"], ["--steps", "-1"]])
def test_nonsense_is_refused_at_once(wrong, capsys):
    with pytest.raises(SystemExit):
        digits_demo.parse(wrong)
    assert "expected" in capsys.readouterr().err


# -- the report, on numbers made by hand


def networks(losses: dict[str, Sequence[float]]) -> list[Result]:
    rows = {"whole pool": 1000}
    return [
        Result(0.2, seed, method, rows.get(method, 50), loss, 0.5, 2.0, 0.1)
        for method, values in losses.items()
        for seed, loss in enumerate(values)
    ]


def lines(**losses: Sequence[float]) -> dict[str, Line]:
    methods = {"ours": "interaction-aware", "whole": "whole pool"}
    found = summarise(networks({methods.get(name, name): values for name, values in losses.items()}))
    return {line.method: line for line in found}


def test_interval_is_students():
    estimate = Estimate.of([1.0, 2.0, 3.0])
    assert (estimate.mean, estimate.std) == (2.0, 1.0)
    assert estimate.half_width == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert not estimate.above_zero()
    assert Estimate.of([2.0, 2.1, 2.2]).above_zero()
    assert Estimate.of([-2.0, -2.1, -2.2]).below_zero()


def test_differences_are_taken_seed_by_seed():
    found = lines(ours=[0.1, 0.6], additive=[3.0, 2.0], random=[1.0, 1.5], whole=[0.5, 0.5])
    ours = found["interaction-aware"]
    assert ours.minus_random.values == pytest.approx((-0.9, -0.9))
    assert ours.minus_random.half_width == pytest.approx(0)
    assert ours.minus_additive.values == pytest.approx((-2.9, -1.4))
    assert found["random"].minus_random is None
    assert found["whole pool"].minus_random is None


def test_verdict_says_what_is_better_and_what_is_worse():
    found = lines(ours=[0.4, 0.5, 0.4], additive=[3.0, 2.9, 3.1], random=[0.1, 0.2, 0.1], whole=[0.4, 0.6, 0.5])
    additive, random, whole = verdict(list(found.values())).splitlines()
    assert re.search(r"additive influence: lower loss in 3 of 3 .* lower at 50 rows, higher at no size", additive)
    assert re.search(r"random rows: lower loss in 0 of 3 .* lower at no size, higher at 50 rows", random)
    assert re.search(r"whole pool: lower loss in 2 of 3 .* lower at no size, higher at no size", whole)


def test_one_seed_has_no_spread():
    found = lines(ours=[0.4], additive=[3.0], random=[0.1], whole=[0.4])
    ours = numbers(table(list(found.values())))[0]
    assert ours[1:4] == ["interaction-aware", "0.40", "+0.30"]
    assert "higher at no size" in verdict(list(found.values()))
