"""Tables of the retrieval benchmark: every cell is a number of the report."""

from __future__ import annotations

import csv
import io
from functools import cache

import pytest
import torch

from lightning_influence.evaluation import RetrievalReport, RetrievalSetting, evaluate_retrieval
from lightning_influence.report import best_line, csv_text, kind_table, layer_of, markdown, method_table
from tests.evaluation.retrieval_cases import NAMES, recorded, sources


@cache
def report() -> RetrievalReport:
    noise = torch.rand(40, 4, generator=torch.Generator().manual_seed(0))
    settings = {
        name: RetrievalSetting(recorded(seed=seed), sources(), baselines={"words": noise})
        for seed, name in enumerate(("same", "other"))
    }
    return evaluate_retrieval(settings, progress=False)


def test_every_way_has_its_line():
    head, *body = method_table(report(), "other")
    assert head == ["found by", "components", "parameters", "accuracy (95 %)", "mrr (95 %)"]
    names = [line[0].split(":")[0] for line in body]
    assert names == [
        "full gradient",
        "greedy, held-out",
        "greedy, in-sample",
        "kind, best on these queries",
        "single component, best on these queries",
        "words",
        "chance",
    ]
    whole = report().line("full gradient", setting="other")
    low, high = whole.accuracy_interval
    assert body[0][1:4] == ["6", "100 %", f"{whole.accuracy:.3f} ({low:.3f} to {high:.3f})"]
    assert body[-1][1:4] == ["", "", "0.250"]
    assert body[5][3].startswith(f"{report().line('baseline', 'words', 'other').accuracy:.3f} (")


def test_best_is_best_and_of_equals_the_first():
    lines = [line for line in report().lines if (line.setting, line.group) == ("same", "component")]
    best = best_line(report(), "same", "component")
    assert best.accuracy == max(line.accuracy for line in lines)
    assert best is next(line for line in lines if line.accuracy == best.accuracy)
    by_mrr = best_line(report(), "same", "component", "mrr")
    assert by_mrr.mrr == max(line.mrr for line in lines)


def test_kinds_in_every_setting():
    head, *body = kind_table(report())
    assert head[3:] == ["same: accuracy (95 %)", "same: best single", "other: accuracy (95 %)", "other: best single"]
    assert [line[0] for line in body] == ["embedding", "q_proj", "k_proj", "up_proj"]
    assert [line[1] for line in body] == ["1", "2", "2", "1"]
    assert body[1][2] == "4 %"  # 10 + 30 of 1000
    singles = [report().line("component", NAMES[k], "other").accuracy for k in (1, 3)]
    assert body[1][6] == f"{max(singles):.3f}, layer {singles.index(max(singles))}"
    assert "layer" not in body[0][4]
    assert body[2][3].startswith(f"{report().line('kind', 'k_proj', 'same').accuracy:.3f} (")


def test_kinds_of_ones_own_have_no_best_single():
    kinds = dict.fromkeys(NAMES[1:], "block")
    own = evaluate_retrieval(RetrievalSetting(recorded(), sources()), kinds=kinds, progress=False)
    assert [line[0] for line in kind_table(own)[1:]] == ["block"]
    assert kind_table(own)[1][-1] == ""


def test_layers_by_name():
    assert layer_of("transformer.h.7.attn.c_attn") == 7
    assert layer_of("layers.0") == 0
    assert layer_of("model.conv2d.weight") is None
    assert [layer_of(name) for name in NAMES] == [None, 0, 0, 1, 1, 1]


def test_markdown_and_csv_come_back():
    table = method_table(report(), "same")
    text = markdown(table)
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert cells[0] == table[0]
    assert cells[2:] == table[1:]
    assert len({len(line) for line in text.splitlines()}) == 1
    rows = report().rows()
    back = list(csv.DictReader(io.StringIO(csv_text(rows))))
    assert back == [{key: "" if value is None else str(value) for key, value in row.items()} for row in rows]


def test_what_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"`best_line\('third', 'kind'\)`: there is no such line; expected one of"):
        best_line(report(), "third", "kind")
    with pytest.raises(ValueError, match=r"`measure='f1'`: expected one of 'accuracy', 'mrr', 'recall@3'"):
        method_table(report(), "same", ["f1"])
    with pytest.raises(ValueError, match="there is no such line"):
        method_table(report(), "third")
