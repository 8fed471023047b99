from __future__ import annotations

import csv
import io
import json

import pytest

from lightning_influence.evaluation.retrieval import RetrievalSetting, evaluate_retrieval
from tests.evaluation.retrieval_cases import NAMES, recorded, sources


@pytest.fixture(scope="module")
def report():
    hard = recorded(noise=20.0)
    return evaluate_retrieval(
        {"easy": RetrievalSetting(recorded(), sources()), "hard": RetrievalSetting(hard, sources())}, splits=2
    )


def test_rows_are_plain_and_flat(report):
    rows = json.loads(json.dumps(report.rows()))
    assert len(rows) == 2 * (4 + 4 + len(NAMES))
    assert list(rows[0]) == [
        *("setting", "group", "name", "components", "share", "accuracy", "accuracy_low", "accuracy_high"),
        *("mrr", "mrr_low", "mrr_high", "recall@3", "recall@3_low", "recall@3_high"),
    ]
    for row in rows:
        assert row["group"] == "chance" or row["accuracy_low"] <= row["accuracy"] <= row["accuracy_high"]
        assert row["group"] == "chance" or row["recall@3_low"] <= row["recall@3"] <= row["recall@3_high"]
        assert row["accuracy"] <= row["recall@3"]
    writer = csv.DictWriter(io.StringIO(), rows[0].keys())
    writer.writerows(rows)


def test_table(report):
    table = str(report)
    lines = [[cell.strip() for cell in line.split("|")] for line in table.splitlines()]
    assert lines[0] == ["setting", "what", "components", "share", "accuracy", "mrr", "recall@3"]
    assert len({len(line) for line in lines}) == 1
    assert not any(line.endswith(" ") for line in table.splitlines())
    easy = [line for line in lines if line[0] == "easy"]
    assert [line[1] for line in easy[:5]] == [
        *("chance", "full gradient", "greedy, in-sample", "greedy, held-out", "kind: embedding")
    ]
    full = report.line("full gradient", setting="easy")
    low, high = full.accuracy_interval
    assert easy[1][2:5] == ["6", "100 %", f"{full.accuracy:.3f} ({low:.3f} to {high:.3f})"]
    assert easy[0][2:5] == ["-", "-", "0.250"]
    singles = [float(line[4].split()[0]) for line in easy if line[1].startswith("component: ")]
    every = sorted((line.accuracy for line in report.lines if line.group == "component"), reverse=True)
    assert len(singles) == 3
    assert singles[0] == pytest.approx(every[0], abs=5e-4)
    assert len(report.table(singles=6).splitlines()) == len(table.splitlines()) + 2 * 3


def test_a_line_that_there_is_not(report):
    with pytest.raises(ValueError, match=r"`RetrievalReport.line\('full gradient', '', setting=None\)`: .* found 2"):
        report.line("full gradient")
    with pytest.raises(ValueError, match="expected one line, found 0 among"):
        report.line("kind", "v_proj", setting="easy")
