"""The examples of influence functions in their quick form: what they write, and whether their numbers can be right."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path += [str(Path(__file__).resolve().parent.parent / folder) for folder in ("examples", "examples/benchmarks")]

import fact_tracing
import find_influential_examples as find
import multi_stage
from instruction_pool import PadRight
from tiny_text import END, UNKNOWN, Words, lines_of, made_sentences
from torch.utils.data import DataLoader

from lightning_influence import EKFAC, InfluenceFunction

ROOT = Path(__file__).resolve().parent.parent


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A script of the examples in a process of its own."""
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}  # bars show up on slow machines
    environment = os.environ | own
    command = [sys.executable, str(ROOT / "examples" / script), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def ran(script: str, *arguments: str) -> str:
    done = run(script, *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def json_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


# -- find_influential_examples.py


def test_candidates_are_ranked_printed_and_written(tmp_path):
    out = tmp_path / "deep" / "found.jsonl"
    printed = ran("find_influential_examples.py", "How many legs have two dogs?", "8", "--quick", "--out", str(out))
    lines = json_lines(out)
    assert [line["rank"] for line in lines] == list(range(1, 21))
    assert sorted(line["rank_by_words"] for line in lines) == list(range(1, 21))
    scores = [line["score"] for line in lines]
    assert scores == sorted(scores, reverse=True)
    assert all(map(math.isfinite, scores))
    assert scores[0] > 0 > scores[-1]
    assert len({line["id"] for line in lines}) == 20
    helpful, harmful = printed.split("most harmful")
    assert [helpful.count(line["id"] + ":") for line in lines[:6]] == [1] * 5 + [0]
    assert harmful.index(lines[-1]["id"]) < harmful.index(lines[-2]["id"])
    assert "64 rows; too long and left out: 0" in printed


def table_file(tmp_path: Path, rows: list[dict[str, Any]]) -> str:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_the_asked_row_itself_helps_most_and_numbers_are_those_of_the_library(tmp_path):
    """A row equal to the question has g^T (G + damping)^-1 g > 0 as its score; words find it first too.

    The model is made twice: an example that drew anything without its seed would give other numbers.
    """
    rows = [{"question": text, "answer": topic} for text, topic in made_sentences(24, 3)]
    file = table_file(tmp_path, rows)
    asked = rows[5]
    options = find.parse([asked["question"], asked["answer"], "--rows", file, "--quick", "--candidates", "10"])
    scores, pool = find.find(options, find.rows_of(options.rows))
    lines = find.ranked(scores, pool)
    assert len(lines) == 10
    assert (lines[0]["id"], lines[0]["rank_by_words"]) == ("line-6", 1)
    assert lines[0]["score"] > 0
    assert scores.num_train == 24
    assert "EKFAC" in scores.formula
    assert "10 candidates by BM25Filter" in scores.formula

    model, tokenizer = find.load(options, pool.rows)
    data = DataLoader(find.Texts(pool.rows, tokenizer), 7, collate_fn=PadRight(tokenizer.pad_token_id))
    influence = InfluenceFunction(model, EKFAC(), components="mlp").fit(data)
    row = influence.score(DataLoader(data.dataset, collate_fn=data.collate_fn), data).total()[5]
    for line in lines:
        place = int(line["id"].removeprefix("line-")) - 1
        assert line["score"] == pytest.approx(float(row[place]), rel=1e-3, abs=1e-3 * lines[0]["score"])


@pytest.mark.parametrize(
    ("rows", "arguments", "says"),
    [
        ([{"question": "a b c"}], [], "line 1: expected an object with `question` and `answer`"),
        ([{"question": "a b c", "answer": "d"}], ["--candidates", "2"], "expected the prompt and 2 candidates"),
        ([], [], "expected a line for each row, it has none"),
    ],
)
def test_rows_that_do_not_do_are_refused(tmp_path, rows, arguments, says):
    options = find.parse(["a", "b", "--quick", "--rows", table_file(tmp_path, rows), *arguments])
    with pytest.raises(ValueError, match=says):
        find.find(options, find.rows_of(options.rows))


def test_a_missing_file_is_refused(capsys):
    with pytest.raises(SystemExit):
        find.parse(["a", "b", "--rows", "no/such.jsonl"])
    assert "expected --rows to be a file, no/such.jsonl is none" in capsys.readouterr().err


# -- multi_stage.py


def test_predictions_are_traced_back(tmp_path):
    """Rows that helped a prediction are of its topic more often than the quarter that chance would give."""
    printed = ran("multi_stage.py", "--quick", "--out", str(tmp_path))
    rows = json_lines(tmp_path / "rows.jsonl")
    assert [(row["query"], row["rank"]) for row in rows] == [(q, k) for q in range(12) for k in range(1, 6)]
    assert all(math.isfinite(row["score"]) for row in rows)
    assert all(a["score"] >= b["score"] for a, b in itertools.pairwise(rows) if a["query"] == b["query"])
    right = sum(row["predicted"] == row["class"] for row in rows if row["rank"] == 1)
    assert right >= 10
    assert f"{right} of 12 questions classified rightly" in printed
    assert sum(row["topic"] == row["class"] for row in rows) / len(rows) > 0.35
    made = made_sentences(240, 0)
    assert all(made[row["row"]] == (row["text"], row["topic"]) for row in rows)

    proximity = json.loads((tmp_path / "proximity.json").read_text())
    names = [name.removeprefix("model.gpt_neox.") for name in proximity]
    parts = ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
    assert names == ["embed_in", *(f"layers.{k}.{part}" for k in range(2) for part in parts)]
    for name, moved in proximity.items():
        assert 0 < moved["relative"] < 1
        assert moved["absolute"] > 0
        assert f"{moved['relative']:>8.1%}  {name}" in printed

    folders = [tmp_path / stage / "curvature" for stage in ("pre-training", "fine-tuning")]
    assert all(len(list(folder.iterdir())) == 1 for folder in folders)  # the five lines need no more than these


def test_lines_of_a_file_are_told_from_shuffled_ones(tmp_path):
    lines = [f"{text} {k}" for k, (text, _) in enumerate(made_sentences(300, 1))]
    file = tmp_path / "text.txt"
    file.write_text("\n".join([*lines, "two words", ""]))
    options = multi_stage.parse(["--text", str(file), "--rows", "200", "--labelled", "60", "--queries", "20"])
    found = multi_stage.texts(options)
    parts = found.pretraining, found.finetuning, found.asked
    assert [len(part) for part in parts] == [200, 60, 20]
    pretraining = {text for text, _ in found.pretraining}
    assert pretraining <= set(lines)
    classified = [*found.finetuning, *found.asked]
    assert [name for _, name in classified] == ["in order", "shuffled"] * 40
    ordered = {" ".join(sorted(text.split())): text for text in lines}
    for text, name in classified:
        original = ordered[" ".join(sorted(text.split()))]
        assert original not in pretraining
        if name == "in order":
            assert text == original
    assert sum(text not in lines for text, name in classified if name == "shuffled") > 35


def test_a_file_with_too_few_lines_is_refused(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("the one line of this file\n")
    with pytest.raises(ValueError, match="expected 2440 different lines, it has 1"):
        multi_stage.texts(multi_stage.parse(["--text", str(file)]))


# -- fact_tracing.py


def test_facts_are_traced_to_the_sentences_that_say_them():
    """Every estimator above chance; those by gradients find what a random order hardly finds."""
    printed = ran("fact_tracing.py", "--quick")
    head, last = printed.strip().splitlines()[-1].split(" ", 1)
    result = json.loads(last)
    assert head == "RESULT"
    assert result.pop("queries") == 16
    names = ["chance", "BM25", "RepSim", "GDP", "GDP, cosine", "EK-FAC", "EK-FAC, 32 by BM25"]
    assert list(result) == names
    assert set(result["BM25"]) == {"mrr", "recall@1", "hit@1", "recall@10", "hit@10"}
    for name in names[3:]:
        assert result[name]["mrr"] > result["chance"]["mrr"] + 0.1
    assert result["EK-FAC"] == result["EK-FAC, 32 by BM25"]  # all 32 sentences are candidates
    assert "16 facts in 32 sentences" in printed


def test_facts_of_a_folder_and_of_a_file(tmp_path):
    """Subjects with two facts come first; a relation with too few wordings is left out."""
    rows = {
        "trex/P1": [{"sub_label": name, "obj_label": f"Town{k}"} for k, name in enumerate("ABCAD")],
        "trex/P2": [{"sub_label": "C", "obj_label": "baker"}],
        "trex/P3": [{"sub_label": "D", "obj_label": "nothing"}],
        "patterns/P1": [{"pattern": p} for p in ("[X] is from [Y] .", "[Y] bore [X].", "[X], of [Y], came.")],
        "patterns/P2": [{"pattern": p} for p in ("[X] is a [Y].", "a [Y] is [X] .", "the [Y] [X].")],
        "patterns/P3": [{"pattern": p} for p in ("[X] is [Y].", "[Y] is [X].")],
    }
    for name, lines in rows.items():
        file = tmp_path / f"{name}.jsonl"
        file.parent.mkdir(exist_ok=True)
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    facts = fact_tracing.facts_for(fact_tracing.parse(["--data", str(tmp_path), "--facts", "5"]))
    assert [fact.subject for fact in facts] == ["C", "C", "A", "B", "D"]
    assert {(f.prompt, f.answer) for f in facts[:2]} == {("C is from", "Town2"), ("C is a", "baker")}
    assert facts[2].answer == "Town0"
    assert sorted(facts[2].statements) == ["A, of Town0, came.", "Town0 bore A."]

    own = {"prompt": "A is from", "answer": "B", "statements": ["A of B."]}
    file = tmp_path / "own.jsonl"
    file.write_text(json.dumps(own) + "\n")
    [fact] = fact_tracing.facts_for(fact_tracing.parse(["--data", str(file), "--facts", "1"]))
    assert (fact.prompt, fact.answer, fact.statements) == ("A is from", "B", ("A of B.",))


def test_facts_that_do_not_do_are_refused(tmp_path, capsys):
    file = tmp_path / "own.jsonl"
    file.write_text(json.dumps({"prompt": "A is from", "answer": "B"}))
    with pytest.raises(ValueError, match="fact 1: expected `prompt`, `answer` and a list `statements`"):
        fact_tracing.facts_for(fact_tracing.parse(["--data", str(file)]))
    with pytest.raises(ValueError, match="expected 49 facts, there are 48"):
        fact_tracing.facts_for(fact_tracing.parse(["--facts", "49"]))
    with pytest.raises(ValueError, match="expected trex"):
        fact_tracing.facts_for(fact_tracing.parse(["--data", str(tmp_path)]))
    with pytest.raises(SystemExit):
        fact_tracing.parse(["--data", "no/such"])
    assert "expected --data to be a folder or a file, no/such is none" in capsys.readouterr().err


def test_the_answer_alone_is_asked_for():
    """Labels of a query are those of its answer; a training sentence is learned whole."""
    tokenizer = fact_tracing.tiny_tokenizer(["Ada is from Oslo."])
    asked, said = fact_tracing.Sentences([("Ada is from", "Oslo"), ("", "Ada is from Oslo.")], tokenizer)
    assert [label != -100 for label in asked["labels"].tolist()] == [False, False, False, True]
    assert said["labels"].tolist() == said["input_ids"].tolist()
    assert asked["text"] == "Ada is from Oslo"
    assert said["text"] == "Ada is from Oslo."


# -- the small texts


def test_words_and_windows(tmp_path):
    words = Words(["b a b", "b a c"], limit=5)  # three for padding, end and unknown
    assert words.numbers == {"b": 3, "a": 4}
    assert words.encode("a c b") == [4, UNKNOWN, 3, END]
    assert torch.equal(words.windows(["a b", "b"], 2), torch.tensor([[4, 3], [END, 3]]))
    file = tmp_path / "text.txt"
    file.write_text("one two three\n\none two\n")
    assert lines_of(file) == ["one two three"]
    file.write_text("\n")
    with pytest.raises(ValueError, match="expected lines of text"):
        lines_of(file)
