"""The recipe of LESS in its quick form, in pieces and killed in between; the rows of a folder; ranks by hand."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import math
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))

import less_recipe
import less_recipe_data
from instruction_pool import InstructionRow
from less_recipe_data import MADE, drawn, folder_texts, made_texts, recipe_data, template_texts
from less_recipe_methods import METHODS, Pool, rows_of
from less_recipe_report import Outcome, lines, mean_ranks, result, seed_ranks, table
from pair_sets import texts
from safetensors.torch import load_file
from study_model import tiny_model, tiny_tokenizer

from lightning_influence import LESSRecorder


def ran(out: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    """What stands behind RESULT, and all that was printed."""
    printed, complaints = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(complaints):
        less_recipe.main(["--quick", "--targets", "travel", "--out", str(out), *arguments])
    assert complaints.getvalue() == ""
    head, last = printed.getvalue().strip().splitlines()[-1].split(" ", 1)
    assert head == "RESULT"
    return json.loads(last), printed.getvalue()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("recipe")
    found, printed = ran(out)
    return out, found, printed


def test_every_method_has_a_loss_and_a_rank(whole):
    out, found, printed = whole
    assert set(found["targets"]) == set(found["untouched"]) == {"travel"}
    by_method = found["targets"]["travel"]
    assert set(by_method) == set(METHODS)
    ranks = {name: line["rank"] for name, line in by_method.items()}
    assert found["mean_rank"] == ranks
    assert sum(ranks.values()) == len(METHODS) * (len(METHODS) + 1) / 2
    for name, line in by_method.items():
        assert 0 < line["target_loss"] < found["untouched"]["travel"]
        assert (line["interval"], line["seeds"]) == (None, [0])
        assert f"  {name:<20} {line['rank']:>4g}  {line['target_loss']:>6.3f}" in printed
    files = list((out / "seed=0" / "fine-tunes").iterdir())
    assert len(files) == len(METHODS)
    for file in files:
        assert len(set(json.loads(file.read_text())["rows"])) == found["settings"]["budget"]
    assert not list((out / "seed=0").rglob("*.ckpt"))
    assert not list((out / "seed=0").rglob("*.tmp"))


def test_who_knows_the_target_finds_its_topic(whole):
    """A sixteenth of the pool is of the topic: random rows have hardly any of it."""
    out, found, _ = whole
    for file in (out / "seed=0" / "fine-tunes").iterdir():
        name, target = file.stem.rsplit("-", 1)
        rows = json.loads(file.read_text())["rows"]
        of_target = sum(row.startswith(f"{target}-") for row in rows)
        if target != "any" and name not in ("newton", "TRAK"):  # one is held by the pool, the other knows 48 numbers
            assert of_target >= 3, file
    for by_method in found["targets"].values():
        losses = {name: line["target_loss"] for name, line in by_method.items()}
        for name in ("interactions", "additive", "LESS", "LESS, repo", "RDS+", "embeddings", "TracIn"):
            assert losses[name] < losses["random"]


def test_a_run_goes_on_where_it_was(whole):
    """Nothing that is there is done again; what is missing comes out as before."""
    out, found, _ = whole
    file = out / "seed=0" / "fine-tunes" / "interactions-travel.json"
    before = json.loads(file.read_text())
    file.unlink()
    again, printed = ran(out)
    assert [line for line in printed.splitlines() if line.startswith("seed")] == [
        next(line for line in printed.splitlines() if line.startswith("seed 0, interactions: travel"))
    ]
    after = json.loads(file.read_text())
    assert (after["rows"], after["losses"]) == (before["rows"], before["losses"])
    assert again == found


def test_another_rate_of_tuning_has_the_same_scores_and_selections(whole):
    out, found, _ = whole
    only = ["--methods", "interactions", "random", "--tune-learning-rate", "1e-4"]
    slow, printed = ran(out, *only)
    assert "scores" not in printed
    assert set(slow["targets"]["travel"]) == {"interactions", "random"}
    assert (slow["settings"].pop("tune_learning_rate"), found["settings"]["tune_learning_rate"]) == (1e-4, 5e-3)
    for name in ("interactions-travel", "random-any"):
        one, other = (
            json.loads((out / f"seed=0/{part}/{name}.json").read_text()) for part in ("fine-tunes-0.0001", "fine-tunes")
        )
        assert one["rows"] == other["rows"]
        assert other["losses"]["travel"] < one["losses"]["travel"] < found["untouched"]["travel"]
    assert ran(out)[0] == found


def test_pieces_of_one_run_share_their_settings(whole, capsys):
    out, _, _ = whole
    with pytest.raises(SystemExit, match=r"it holds a run with other settings, \{'targets'"):
        less_recipe.main(["--quick", "--out", str(out), "--targets", "cooking"])


# -- another model, and scores that are shared


def test_a_model_of_a_folder_with_scores_of_one_warm_up(tmp_path):
    words = texts(template_texts(["travel"]).all())
    tokenizer = tiny_tokenizer(words)
    tiny_model(tokenizer, 3).save_pretrained(tmp_path / "llama")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "llama")
    out, options = tmp_path / "out", ["--warm-up-seed", "2", "--curvature-rows", "20", "--dtype", "bfloat16"]
    options += ["--model", str(tmp_path / "llama"), "--methods", "random", "newton", "interactions"]
    found, printed = ran(out, *options, "--seeds", "0", "--tables", "length", "influence")
    assert [file.name for file in sorted(out.rglob("scores/*"))] == ["influence.safetensors", "length.safetensors"]
    assert found["settings"]["model"] == "llama"
    rows = [json.loads((out / f"seed=0/fine-tunes/{name}.json").read_text())["rows"] for name in TUNED]
    again, printed = ran(out, *options, "--seeds", "1")
    assert "scores" not in printed
    others = [json.loads((out / f"seed=1/fine-tunes/{name}.json").read_text())["rows"] for name in TUNED]
    assert [one == other for one, other in zip(rows, others, strict=True)] == [False, True, True]
    for by_method in again["targets"].values():
        assert all(line["seeds"] == [0, 1] and math.isfinite(line["target_loss"]) for line in by_method.values())
    scores = load_file(out / "seed=2/scores/influence.safetensors")
    assert all(values.isfinite().all() for values in scores.values())
    assert (scores["squares"] > 0).all()
    assert scores["marks"].shape == (16, 64)
    near = scores["marks"][:, scores["places"]].diagonal(), scores["squares"][scores["places"]]
    torch.testing.assert_close(*near, rtol=0.05, atol=0)


TUNED = ("random-any", "newton-travel", "interactions-travel")


def test_batches_of_the_pool_have_rows_of_about_the_same_length(training):
    lengths = training("lengths").data.pool.lengths()
    assert lengths == sorted(lengths)


# -- the warm-up, killed


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    def make(name: str) -> Pool:
        out = tmp_path_factory.mktemp(name)
        options = less_recipe.parse(["--quick", "--targets", "travel", "--out", str(out)])
        recipe = less_recipe.recipe_of(options)
        made = less_recipe.prepared(recipe, options)
        return Pool(out / "seed=0", made.data, recipe, made, 0)

    less_recipe.silence()
    return make


@pytest.mark.parametrize("dies_at", [1, 2])
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_warm_up_killed_before_a_recording_gives_the_same_scores(dies_at, whole, training, monkeypatch):
    """The checkpoint is there and its recording is not: in the middle, and at the very end."""
    expected = load_file(whole[0] / "seed=0" / "scores" / "less.safetensors")["scores"]
    pool, record, seen = training("killed"), LESSRecorder.record, []

    def dying(self, recording):
        seen.append(recording.step)
        if len(seen) == dies_at:
            raise OSError("killed")
        record(self, recording)

    monkeypatch.setattr(LESSRecorder, "record", dying)
    with pytest.raises(RuntimeError, match="killed"):
        pool.table("less")
    torch.testing.assert_close(pool.table("less").values, expected, rtol=1e-12, atol=0)
    assert len(set(seen)) == 2
    assert not list(pool.folder.rglob("*.ckpt"))


def test_the_recorded_warm_up_is_the_one_that_is_kept(training):
    """The model of the other estimators has the weights of the last recording."""
    pool = training("one")
    kept = pool.training.warm(0).state_dict()
    again = pool.training.warm(0).state_dict()
    recorded = pool.training._warmed(0, []).state_dict()
    start = pool.training.original(0).state_dict()
    assert all(torch.equal(kept[name], recorded[name]) and torch.equal(kept[name], again[name]) for name in kept)
    moved = [name for name in kept if not torch.equal(kept[name], start[name])]
    assert moved
    assert all("lora" in name for name in moved)


def test_drawn_rows_depend_on_the_seed_alone(training):
    pool = training("drawn")
    assert rows_of(pool, "random", "any") == rows_of(pool, "random", "travel")
    assert rows_of(pool, "length", "any") == rows_of(pool, "length", "travel")
    longest = sorted((int((item["labels"] != -100).sum()) for item in pool.data.pool), reverse=True)
    taken = [int((pool.data.pool[row]["labels"] != -100).sum()) for row in rows_of(pool, "length", "any")]
    assert taken == longest[: pool.recipe.budget]


# -- the rows of a folder


def mmlu_archive(folder: Path) -> None:
    folder.mkdir()
    with zipfile.ZipFile(folder / "mmlu.zip", "w") as archive:
        for split in ("dev", "val", "test"):
            made = io.StringIO()
            csv.writer(made).writerows([[f"{split} {k}?", "a, b", "c", "d", "e", "B"] for k in range(2)])
            archive.writestr(f"data/{split}/law_{split}.csv", made.getvalue())


@pytest.fixture
def folder(tmp_path):
    """A few rows in each file."""
    flat = [{"instruction": f"say {k}", "input": "twice" * (k % 2), "output": f"it is {k}"} for k in range(8)]
    files: dict[str, Any] = {
        "dolly/dolly_3k.json": [row | {"instruction": row["instruction"] + " again"} for row in flat],
        "lima/lima.json": [
            {**row, "instruction": f"lima {k}", "history": [["a", "b"]] * (k == 0)} for k, row in enumerate(flat)
        ],
        "bbh/bbh/snarks.json": {"examples": [{"input": f"which {k}", "target": "(A)"} for k in range(9)]},
    }
    lined: dict[str, Any] = {
        "dolly/dolly_hhrlhf_train_small.jsonl": [
            {"prompt": f"Below.\n\n### Instruction:\nask {k}\n\n### Response:\n", "response": " yes"} for k in range(8)
        ],
        "self_instruct/seed_tasks.jsonl": [
            {
                "instruction": "seed",
                "instances": [{"input": "one\u2028", "output": "1"}, {"input": "two", "output": ""}],
            }
        ],
        "tulu_eval/eval_instances_tulu_1.jsonl": [
            {"prompt": f"tulu {k}", "completions": [{"completion": "first"}, {"completion": "second"}]}
            for k in range(8)
        ],
        "gsm8k/train.jsonl": [{"question": f"train {k}", "answer": "48/2 = <<48/2=24>>24\n#### 24"} for k in range(4)],
        "gsm8k/test.jsonl": [{"question": f"test {k}", "answer": "#### 1"} for k in range(4)],
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps(content))
    for name, rows in lined.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    (tmp_path / "alpaca").mkdir()
    with gzip.open(tmp_path / "alpaca/alpaca_cleaned.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in flat)
    mmlu_archive(tmp_path / "mmlu")
    return tmp_path


TARGETS = ["gsm8k", "mmlu/law", "bbh/snarks"]


def test_what_a_folder_holds(folder):
    found = folder_texts(folder, TARGETS)
    assert {name: len(rows) for name, rows in found.pool.items()} == {
        "alpaca": 8,
        "dolly": 8,
        "dolly_hhrlhf": 8,
        "lima": 7,
        "self_instruct": 1,
        "tulu_eval": 8,
    }
    assert [found.pool["alpaca"][k].question for k in (0, 1)] == ["say 0", "say 1\n\ntwice"]
    assert found.pool["dolly_hhrlhf"][3] == InstructionRow("dolly_hhrlhf-00003", "dolly_hhrlhf", "ask 3", "yes")
    assert found.pool["self_instruct"][0].question == "seed\n\none"
    assert found.pool["tulu_eval"][0].answer == "first"
    assert found.targets["gsm8k"][0][0].answer == "48/2 = 24\n#### 24"
    assert [row.question for row in found.targets["gsm8k"][1]] == [f"test {k}" for k in range(4)]
    queries, held_out = found.targets["mmlu/law"]
    assert [row.question.splitlines()[0] for row in queries] == ["dev 0?", "dev 1?", "val 0?", "val 1?"]
    assert held_out[0] == InstructionRow("mmlu/law-00000", "mmlu/law", "test 0?\nA. a, b\nB. c\nC. d\nD. e", "B. c")
    queries, held_out = found.targets["bbh/snarks"]
    assert sorted(row.question for row in [*queries, *held_out]) == [f"which {k}" for k in range(9)]


def test_parts_share_no_row(folder):
    found = folder_texts(folder, ["gsm8k", "bbh/snarks"])
    found.pool["lima"] += found.targets["gsm8k"][1]  # all of them are held out
    tokenizer = tiny_tokenizer(texts(found.all()))
    data = recipe_data(found, tokenizer, 24, 2, 4, 60)
    sources = data.sources
    assert len(data.pool) == len(sources) == len({row.question for row in data.pool.rows}) == 24
    shares = {name: sources.count(name) for name in found.pool}
    assert shares == {"alpaca": 7, "dolly": 4, "dolly_hhrlhf": 4, "lima": 4, "self_instruct": 1, "tulu_eval": 4}
    wanted = {row.question for part in (data.queries, *data.held_out.values()) for row in part.rows}
    assert not wanted & {row.question for row in data.pool.rows}
    assert [data.members(name) for name in data.held_out] == [[0, 1], [2, 3]]
    assert [len(part) for part in data.held_out.values()] == [4, 4]
    again = recipe_data(found, tokenizer, 24, 2, 4, 60)
    assert [row.id for row in again.pool.rows] == [row.id for row in data.pool.rows]


def test_made_rows_of_a_target_are_in_the_pool_too_but_other_ones(monkeypatch):
    def made(families, rows):
        return [InstructionRow(f"{f}-{k}", f, f"{f} asks {k}", str(k)) for f in families for k in range(rows)]

    monkeypatch.setattr(less_recipe_data, "instruction_rows", made)
    found = made_texts(["time_intervals"], 19, 3, 5)
    data = recipe_data(found, tiny_tokenizer(texts(found.all())), 19, 3, 5, 40)
    assert [data.sources.count(name) for name in MADE] == [3, *[2] * 8]
    assert [len(data.pool), len(data.queries), len(data.held_out["time_intervals"])] == [19, 3, 5]
    rows = [row.id for part in (data.pool, data.queries, *data.held_out.values()) for row in part.rows]
    assert len(set(rows)) == 27


def test_rows_that_are_not_there_are_named(folder):
    rows = [InstructionRow(f"x-{k}", "x", str(k % 3), "y") for k in range(6)]
    assert len(drawn("x", rows, 3, lambda row: True)) == 3
    with pytest.raises(ValueError, match=r"x: expected 4 different rows .*, it has 3 of 6"):
        drawn("x", rows, 4, lambda row: True)
    with pytest.raises(ValueError, match=r"expected data/test/art_test.csv|expected data/dev/art_dev.csv"):
        folder_texts(folder, ["mmlu/art"])
    (folder / "lima/lima.json").unlink()
    with pytest.raises(ValueError, match=r"expected the file lima/lima.json there"):
        folder_texts(folder, TARGETS)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--data", "no/such"], "expected --data to be a folder, no/such is none"),
        (["--data", ".", "--targets", "maths"], "expected --targets gsm8k, mmlu/<subject> or bbh/<task>, got maths"),
        (["--targets", "gsm8k"], "expected --targets some of leg_counting"),
        (["--only", "coin_flip"], "expected --only some of the targets leg_counting"),
        (["--budget", "5"], "expected --budget and --warm-up as shares"),
        (["--steps", "0"], "--steps"),
        (["--curvature-rows", "0"], "--curvature-rows, --tune-learning-rate > 0"),
        (["--landmarks", "2401"], "expected --landmarks from 0 to the 2400 rows of the pool"),
        (["--warm-up-seed", "-1"], "--seeds and --warm-up-seed >= 0"),
        (["--device", "hpu"], "expected --device to be one that this machine has, such as cpu; got hpu"),
        (["--device", "gpu"], "expected --device to be one that this machine has, such as cpu; got gpu"),
        (["--scored-rows", "0"], "--scored-rows, --curvature-rows, --tune-learning-rate > 0"),
        (["--model", "no/such"], "expected --model to be a folder with config.json, no/such has none"),
    ],
)
def test_nonsense_is_refused_at_once(arguments, says, capsys, monkeypatch):
    monkeypatch.delenv("LI_DATA", raising=False)
    with pytest.raises(SystemExit):
        less_recipe.parse(arguments)
    assert says in capsys.readouterr().err


# -- the report, on numbers made by hand


def test_ranks_means_and_intervals():
    losses = {"a": [1.0, 2.0, 3.0], "random": [2.0, 2.0, 5.0], "b": [2.0, 3.0, 4.0], "half": [0.0]}
    made = [Outcome("t", name, seed, x) for name, own in losses.items() for seed, x in enumerate(own)]
    made += [Outcome("u", name, 0, x) for name, x in (("a", 3.0), ("random", 1.0), ("b", 2.0))]
    found = lines(made)
    assert [(line.target, line.method, line.rank) for line in found] == [
        ("t", "a", 1),
        ("t", "random", 2.5),
        ("t", "b", 2.5),
        ("t", "half", None),
        ("u", "random", 1),
        ("u", "b", 2),
        ("u", "a", 3),
    ]
    assert mean_ranks(found) == {"random": 1.75, "a": 2.0, "b": 2.25}
    assert seed_ranks(found) == {"random": [1.75], "a": [2.0], "b": [2.25]}  # the targets share one seed
    whole = [line for line in found if line.target == "t"]
    assert seed_ranks(whole) == {"a": [1.0, 1.5, 1.0], "random": [2.5, 1.5, 3.0], "b": [2.5, 3.0, 2.0]}
    assert seed_ranks([]) == {}
    first = found[0]
    assert first.loss == 2
    assert first.interval == pytest.approx((2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3)), rel=1e-4)
    text = table(found, {"t": 9.0, "u": 8.0})
    assert "-0.484 to 4.484       3  2 of 3" in text
    assert "untouched model             9.000" in text
    assert "  a                     1.00  1.00 to 1.50" in table(whole, {"t": 9.0})
    told = result(found, {"t": 9.0, "u": 8.0})
    assert told["targets"]["t"]["half"] == {"target_loss": 0.0, "interval": None, "rank": None, "seeds": [0]}
    json.dumps(told, allow_nan=False)
