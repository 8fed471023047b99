"""The study of components and projections in its quick form: what it writes, what that says, what it refuses."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))  # as for a script that runs there

import select_or_project
import study_findings
from instruction_pool import chat_tokens
from pair_sets import file_pairs, fits, template_pairs, texts
from study_findings import Difference
from study_model import tiny_tokenizer
from study_stages import Cost, Stages

from lightning_influence import BM25Filter, Store, StoreError
from lightning_influence.estimators.component_dots import ComponentDots
from lightning_influence.selection.component_path import ComponentSelection

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = ("paraphrased", "model-generated")
N = 40


def study(out: Path, *arguments: str) -> str:
    """Standard output of the script in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    script = str(ROOT / "examples" / "select_or_project.py")
    command = [sys.executable, script, "--quick", "--queries", str(N), "--out", str(out), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> tuple[Path, dict[str, Any], str]:
    """The quick run, which most tests below look at."""
    out = tmp_path_factory.mktemp("study")
    printed = study(out)
    return out, json.loads((out / "results.json").read_text()), printed


def cells(markdown: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines() if line[:1] == "|"]


def line(results: dict[str, Any], setting: str, group: str, name: str = "") -> dict[str, Any]:
    [found] = [x for x in results["lines"] if (x["setting"], x["group"], x["name"]) == (setting, group, name)]
    return found


# -- what is written


def test_everything_is_written(quick):
    out, results, printed = quick
    assert (out / "summary.md").read_text().strip() in printed
    for picture in ("depth.png", "share.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    assert results["options"]["queries"] == N
    assert f"--quick --queries {N} --out {out}" in (out / "summary.md").read_text()
    assert set(results["candidate_recall"]) == set(SETTINGS)


def test_one_number_stands_everywhere(quick):
    """Lines of the JSON are those of the CSV, and the cells of the summary are made from them."""
    out, results, _ = quick
    with (out / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows == [{k: "" if v is None else str(v) for k, v in x.items()} for x in results["lines"]]
    text = (out / "summary.md").read_text()
    for setting in SETTINGS:
        table = cells(text.split(f"### {setting}\n")[1].split("###")[0])
        shown = {row[0]: row[3] for row in table[2:]}
        for name in ("full gradient", "greedy, held-out", "greedy, in-sample"):
            own = line(results, setting, name)
            assert shown[name] == f"{own['accuracy']:.3f} ({own['accuracy_low']:.3f} to {own['accuracy_high']:.3f})"
        for name in ("BM25", "factored projection, 1 %, seed 0", "factored projection, 5 %, seed 0"):
            assert shown[name].startswith(f"{line(results, setting, 'baseline', name)['accuracy']:.3f} (")
        assert shown["chance"] == "0.200"
    kinds = {row[0]: row for row in cells(text.split("## Kinds of components")[1].split("##")[0])[2:]}
    assert list(kinds) == [*("embedding", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")]
    for kind, row in kinds.items():
        assert row[3].startswith(f"{line(results, SETTINGS[0], 'kind', kind)['accuracy']:.3f} (")
        assert row[5].startswith(f"{line(results, SETTINGS[1], 'kind', kind)['accuracy']:.3f} (")


def test_numbers_follow_from_the_recording_alone(quick):
    """Full gradient and chosen components, once more from what is on disk, a query at a time."""
    out, results, _ = quick
    dots = ComponentDots.load(Store.open(out / "recording"))
    assert len(dots.components) == 3 * 7 + 1
    chosen = json.loads((out / "components.json").read_text())
    for k, setting in enumerate(SETTINGS):
        names = tuple(ComponentSelection.from_dict(chosen[setting]))
        for subset, group in ((None, "full gradient"), (names, "greedy, in-sample")):
            cosines = dots.cosine(subset)
            hits = 0
            for query in range(N):
                places = (dots.pairs[:, 0] == k * N + query).nonzero().flatten()
                assert len(places) == 5
                ids = [dots.train_ids[row] for row in dots.pairs[places, 1].tolist()]
                own = dict(zip(ids, cosines[places].tolist(), strict=True))
                hits += all(own[query] > value for name, value in own.items() if name != query)
            assert hits / N == line(results, setting, group)["accuracy"]


def test_projections_come_near_the_full_gradient(quick):
    """A mean over all pairs: projected cosines scatter around the exact ones, the larger projection less."""
    out, _, _ = quick
    store = Store.open(out / "recording")
    exact = ComponentDots.load(store).cosine().reshape(2 * N, 5)
    errors = []
    for share in (1, 5):
        table = store.read_rows(f"factored-projection-{share}-seed-0")
        found = torch.cat([part.values["cosine"] for part in table])
        errors.append(float((found - exact).abs().mean()))
    assert errors[1] < errors[0] < 0.1


def test_queries_are_made_as_they_are_called(quick):
    out, _, _ = quick
    head, *lines = [json.loads(row) for row in (out / "completions.jsonl").read_text().splitlines()]
    assert head["max_new_tokens"] == 24
    pairs = template_pairs()
    known = {row.question for row in pairs.queries["paraphrased"]}
    assert len(lines) == N
    assert {row["prompt"] for row in lines} <= known
    assert all(len(row["completion"].split()) <= 24 for row in lines)


def test_costs_are_in_the_unit_of_bare_passes(quick):
    out, results, _ = quick
    costs = {cost["stage"]: cost for cost in results["costs"]}
    assert costs["bare forward and backward"]["ratio_to_bare_passes"] == pytest.approx(1)
    for name in ("component dot products", "factored projection, 1 %, seed 0"):
        assert costs[name]["examples"] == 3 * N
        bare = costs["bare forward and backward"]
        [tokens] = [c["tokens"] for c in json.loads((out / "costs.json").read_text()) if c["stage"] == bare["stage"]]
        per_token = costs[name]["seconds"] / results["rows"]["tokens"]
        assert costs[name]["ratio_to_bare_passes"] == pytest.approx(per_token / (bare["seconds"] / tokens))
    assert costs["completions by the model"]["ratio_to_bare_passes"] is None


def test_every_verdict_follows_from_its_interval(quick):
    _, results, _ = quick
    verdicts = {finding["verdict"] for finding in results["findings"]}
    assert verdicts <= {"holds", "does not hold", "cannot be told"}
    for finding in results["findings"]:
        if "difference" in finding["numbers"]:
            low, high = map(float, finding["numbers"].split("(")[1].rstrip(")").split(" to "))
            expected = "holds" if low > 0 else "does not hold" if high < 0 else "cannot be told"
            assert finding["verdict"] == expected


# -- going on, and refusing to


def test_a_run_goes_on_with_what_is_there(quick, tmp_path):
    """The same folder with one more projection: nothing else is done again, and the numbers stay."""
    out, results, _ = quick
    printed = study(out, "--shares", "0.01", "0.05", "0.02")
    again = json.loads((out / "results.json").read_text())
    assert "component dot products" not in printed.split("# Select or project")[0]
    assert [x for x in again["lines"] if "2 %" not in x["name"]] == results["lines"]
    assert len(again["lines"]) == len(results["lines"]) + 2
    for name in ("component dot products", "factored projection, 1 %, seed 0"):
        first, second = ([c for c in r["costs"] if c["stage"] == name] for r in (results, again))
        assert first[0]["seconds"] == second[0]["seconds"]


def test_other_rows_are_not_mixed_with_those_recorded(quick, monkeypatch):
    out, _, _ = quick
    monkeypatch.setattr(select_or_project, "silence", lambda: None)  # it would last
    with pytest.raises(StoreError, match="rows"):
        select_or_project.main(["--quick", "--queries", str(N + 1), "--out", str(out)])


@pytest.mark.parametrize(
    "wrong",
    [
        ["--candidates", "1"],
        ["--queries", "3"],
        ["--shares", "0"],
        ["--seeds", "0"],
        ["--max-tokens", "0"],
        ["--memory", "0"],
        ["--pairs", "no such file"],
    ],
)
def test_nonsense_is_refused_at_once(wrong, capsys):
    with pytest.raises(SystemExit):
        select_or_project.parse(wrong)
    assert "expected" in capsys.readouterr().err


def test_defaults_are_those_of_the_study():
    full, small = select_or_project.parse([]), select_or_project.parse(["--quick"])
    assert (full.queries, full.candidates, full.shares, full.seeds) == (200, 5, (0.01, 0.05), 1)
    assert full.out == Path("runs/select_or_project")
    assert (small.queries, small.shares) == (60, full.shares)


# -- rows


def test_template_rows_are_distinct_and_words_alone_mislead():
    pairs = template_pairs()
    assert len(pairs) >= 240
    assert len({row.question for row in pairs.base} | {row.question for row in pairs.queries["paraphrased"]}) == 640
    assert len({row.id for row in pairs.base}) == len(pairs)
    for base, query in zip(pairs.base, pairs.queries["paraphrased"], strict=True):
        assert base.id == query.id
        assert "{" not in base.question + base.answer + query.question + query.answer
    search, words = BM25Filter(texts(pairs.base)), texts(pairs.queries["paraphrased"])
    found = search.candidates(words, 5)
    sources = torch.arange(len(pairs))[:, None]
    assert 0.1 < float((found[:, :1] == sources).double().mean()) < 0.5  # not by words alone
    assert float((found == sources).any(1).double().mean()) > 0.8  # but among the nearest


def test_a_sample_is_seeded_and_keeps_pairs_together():
    pairs = template_pairs()
    first, again, other = (pairs.sample(30, seed, lambda row: True) for seed in (0, 0, 1))
    assert first == again
    assert first.base != other.base
    assert [row.id for row in first.base] == [row.id for row in first.queries["paraphrased"]]
    short = pairs.sample(30, 0, lambda row: len(row.answer) < 120)
    assert all(len(row.answer) < 120 for row in (*short.base, *short.queries["paraphrased"]))
    assert short.left_out > 0
    with pytest.raises(ValueError, match=r"`--queries 400`: expected at most 320, the pairs of templates"):
        pairs.sample(400, 0, lambda row: True)


def test_rows_of_a_file(tmp_path):
    rows = [
        {"instruction": "Say hello.", "input": "", "output_a": "Hello.", "output_b": "Hi!"},
        {"instruction": "Double it.", "input": "4", "output_a": "8", "output_b": "Eight", "source_b": "x"},
        {"instruction": "Say hello.", "input": "", "output_a": "Good day.", "output_b": "Hey"},
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = file_pairs(file)
    assert [(row.question, row.answer) for row in pairs.base] == [("Say hello.", "Hello."), ("Double it.\n\n4", "8")]
    assert [row.answer for row in pairs.queries["other completion"]] == ["Hi!", "Eight"]
    generated = pairs.with_generated(["Yo", "It is 8"])
    assert [row.answer for row in generated.queries["model-generated"]] == ["Yo", "It is 8"]
    assert [row.question for row in generated.queries["model-generated"]] == [row.question for row in pairs.base]


@pytest.mark.parametrize(
    "wrong",
    ["no json", "[1]", '{"instruction": "a"}', '{"instruction": "a", "input": "", "output_a": " ", "output_b": "b"}'],
)
def test_a_bad_line_is_named(wrong, tmp_path):
    file = tmp_path / "pairs.jsonl"
    good = {"instruction": "a", "input": "", "output_a": "b", "output_b": "c"}
    file.write_text(json.dumps(good) + "\n" + wrong + "\n")
    with pytest.raises(ValueError, match=r"pairs.jsonl:2: expected a JSON object with the texts instruction, input"):
        file_pairs(file)


def test_tiny_tokenizer_knows_every_word_and_counts_tokens():
    pairs = template_pairs()
    tokenizer = tiny_tokenizer(texts([*pairs.base, *pairs.queries["paraphrased"]]))
    row = pairs.base[0]
    prompt, answer = chat_tokens(row, tokenizer)
    assert tokenizer.unk_token_id not in prompt + answer
    assert answer[-1] == tokenizer.eos_token_id
    assert tokenizer.convert_ids_to_tokens(prompt)[0] == "[user]"
    assert tokenizer.convert_ids_to_tokens(prompt)[-1] == "[assistant]"
    length = len(prompt) + len(answer)
    assert fits(tokenizer, length)(row)
    assert not fits(tokenizer, length - 1)(row)


# -- verdicts and costs, on numbers made by hand


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [
        ((0.01, 0.2), "holds"),
        ((-0.2, -0.01), "does not hold"),
        ((-0.1, 0.1), "cannot be told"),
        ((0.0, 0.1), "cannot be told"),
    ],
)
def test_a_difference_is_told_by_its_interval(interval, verdict):
    assert Difference("", "", "", sum(interval) / 2, interval).better == verdict


def test_equal_queries_do_not_make_a_certain_difference():
    low, high = study_findings._around(torch.zeros(50))
    assert low < 0 < high
    low, high = study_findings._around(torch.ones(50))
    assert 0.9 < low < 1 == high


def test_costs_are_kept_over_runs(tmp_path, capsys):
    stages = Stages(tmp_path)
    with stages.stage("passes", 10, 100) as stage:
        stage.advance(10)
    again = Stages(tmp_path)
    assert again.costs == stages.costs
    assert again.costs["passes"] == Cost("passes", stages.costs["passes"].seconds, 10, 100)
    with again.stage("passes", 10, resumed=True):
        pass
    assert Stages(tmp_path).costs == stages.costs
    assert "the rest of an earlier run" in capsys.readouterr().out
