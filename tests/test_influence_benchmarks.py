"""The benchmarks of influence functions in their quick form: what they print, and whether it can be right."""

from __future__ import annotations

import argparse
import json
import sys
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file

from tests.test_influence_examples import ROOT, ran

sys.path += [str(ROOT / folder) for folder in ("examples", "examples/benchmarks")]

import influence_table
from tiny_text import Words, made_sentences

# -- benchmarks/influence_table.py

METHODS = [
    "CG",
    "EK-FAC",
    "EK-FAC, MLP only",
    "GDP",
    "CKA",
    "TRAK",
    "CG, EK-FAC-preconditioned",
    "CG, as few steps",
    "Arnoldi",
    "LiSSA",
]


def test_the_table_has_a_line_for_each_method(tmp_path):
    """The better an inverse, the nearer to the reference; what has none costs nothing beforehand."""
    weights = tmp_path / "weights.safetensors"
    printed = ran("benchmarks/influence_table.py", "--quick", "--weights", str(weights))
    head, last = printed.strip().splitlines()[-1].split(" ", 1)
    result = json.loads(last)
    assert head == "RESULT"
    assert list(result) == METHODS
    for method, line in result.items():
        assert -1 <= line["spearman"] <= 1
        assert line["pairwise_s"] > 0
        assert line["overhead_s"] > 0 or method in ("GDP", "CKA")
        [shown] = [text for text in printed.splitlines() if text.startswith(f"{method:<28}")]
        assert float(shown[28:].split()[0]) == pytest.approx(line["spearman"], abs=6e-4)
    spearman = {method: line["spearman"] for method, line in result.items()}
    assert spearman["CG"] == 1
    assert result["CG"]["residual"] <= 1e-2
    assert spearman["CG, EK-FAC-preconditioned"] > 0.9
    assert spearman["EK-FAC"] > 0.6 > spearman["CKA"]
    assert spearman["CG, EK-FAC-preconditioned"] > max(spearman["EK-FAC"], spearman["CG, as few steps"])
    assert spearman["EK-FAC"] > spearman["GDP"]
    assert result["EK-FAC"]["pairwise_s"] < result["CG"]["pairwise_s"] / 3
    assert result["CG, EK-FAC-preconditioned"]["steps"] == result["CG, as few steps"]["steps"] < result["CG"]["steps"]

    args = influence_table.parse(["--quick", "--weights", str(weights)])
    again = influence_table.build(args).model  # read, not trained
    known = load_file(weights)
    assert all(torch.equal(known[name], p) for name, p in again.named_parameters())
    args.steps += 1
    with pytest.raises(ValueError, match=r"weights of another run, which differs in \['steps'\]"):
        influence_table.build(args)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--data", "no/such"], "expected --data to be a folder with ptb/ptb.train.txt, no/such has no ptb"),
        (["--rows", "16"], "expected --rows >= 32"),
        (["--curvature-rows", "501"], "expected --curvature-rows from 1 to --rows"),
    ],
)
def test_the_table_refuses_what_it_cannot_do(arguments, says, capsys, monkeypatch):
    monkeypatch.delenv("LI_DATA", raising=False)
    with pytest.raises(SystemExit):
        influence_table.parse(arguments)
    assert says in capsys.readouterr().err


def test_the_table_takes_penn_treebank_from_the_folder_named_in_the_environment(tmp_path, monkeypatch):
    """As many tokens, words and sequences as are asked for, queries from the held-out file."""
    (tmp_path / "ptb").mkdir()
    for part, seed in (("train", 0), ("valid", 1)):
        lines = [text for text, _ in made_sentences(80, seed)]
        (tmp_path / "ptb" / f"ptb.{part}.txt").write_text("\n".join(lines))
    monkeypatch.setenv("LI_DATA", str(tmp_path))
    sizes = ["--rows=16", "--layers=2", "--width=16", "--length=8", "--steps=2", "--vocabulary=30", "--queries=3"]
    args = influence_table.parse([*sizes, "--curvature-rows=9"])
    learned, held_out = influence_table.texts(args)
    assert [len(learned), len(held_out)] == [80, 80]
    table = influence_table.build(args)
    assert [len(table.rows), len(table.queries), len(table.fitted_on)] == [16, 3, 9]
    words = Words(learned, 30)
    assert all(row.tolist() in words.windows(learned, 8).tolist() for row in table.rows.tokens)
    assert all(row.tolist() in words.windows(held_out, 8).tolist() for row in table.queries.tokens)


def test_the_damping_of_the_table_is_a_share_of_the_mean_eigenvalue():
    """Trace of the Fisher over the number of parameters, as a solver over all components finds it by itself."""
    args = influence_table.parse(["--quick"])
    args.steps, args.sentences = 2, 400
    table = influence_table.build(args)
    own = influence_table.CG(damping_share=args.damping_share, seed=args.seed)
    own.fit(table.model, table.fitted_on, components=influence_table.BLOCKS, batch_size=args.batch, progress=False)
    assert table.damping == pytest.approx(own._damping, rel=1e-4)


# -- benchmarks/ekfac.py and ekfac_growth.py, beside kronfluence

without_rival = pytest.mark.skipif(find_spec("kronfluence") is None, reason="kronfluence is not installed")
TINY = ["--sequences=6", "--queries=3", "--width=16", "--layers=1", "--vocabulary=30", "--length=8", "--batch=4"]


@without_rival
@pytest.mark.filterwarnings("ignore")  # those of kronfluence
def test_scores_are_those_of_kronfluence():
    """No label is drawn, so that nothing but rounding is between them; and low rank is timed on both sides."""
    import ekfac

    args = ekfac.parse([*TINY, "--rank=2"])
    model, data, queries = ekfac.build(args)
    assert [len(data), len(queries)] == [6, 3]
    found = ekfac.agreement(model, data, queries, args)
    assert found["spearman"] > 0.9999
    assert found["score_error"] < 1e-4
    times = ekfac.rounds(argparse.Namespace(**{**vars(args), "repeats": 1}), model, data, queries)
    parts = [f"{name}_{part}" for name in ("ours", "rival") for part in ("fit", "score", "low_rank")]
    assert sorted(times) == sorted(["bare", "ours_fit_again", *parts])
    ratios = ekfac.ratios(times)
    assert ratios["fit_ratio_kronfluence"] == times["ours_fit"] / times["rival_fit"]
    assert ratios["low_rank_score_ratio_kronfluence"] == times["ours_low_rank"] / times["rival_low_rank"]


@without_rival
def test_smollm2_needs_a_text_or_random_weights(capsys):
    import ekfac

    for arguments in ([], ["--text=no/such.txt"]):
        with pytest.raises(SystemExit):
            ekfac.parse(["--model=smollm2", *arguments])
        assert "expected --text to be a file of text for smollm2, or --random-weights" in capsys.readouterr().err
    args = ekfac.parse(["--model=smollm2", "--random-weights"])
    assert (args.sequences, args.batch) == (64, 4)


@without_rival
def test_growth_is_fitted():
    """An exponent for each size and part, and that of an exact power."""
    import ekfac_growth

    assert ekfac_growth.exponent([16, 32, 64], [0.5 * n**1.5 for n in (16, 32, 64)]) == pytest.approx(1.5)
    printed = ran("benchmarks/ekfac_growth.py", "--quick")
    head, last = printed.strip().splitlines()[-1].split(" ", 1)
    assert head == "RESULT"
    result = json.loads(last)
    assert list(result) == ["sequences", "length", "width", "queries"]
    assert all(set(line) == {"fit", "fit_again", "score"} for line in result.values())
    assert result["width"]["fit"] > result["queries"]["fit"]  # the fit knows nothing of queries
