from __future__ import annotations

import pytest
import torch
from scipy import stats

from lightning_influence.evaluation.retraining import Retraining
from lightning_influence.evaluation.selection_curves import selection_curves
from lightning_influence.selection.top_k import TopK
from tests.evaluation.retraining_cases import Counted

VALUES = torch.tensor([0.1, 0.9, 0.5, 0.7])


def loss(ids, seed):
    """Falls with the values of the rows that are trained on, by a factor that the seed decides."""
    return [1.0, 3.0 - (1 + seed) * float(VALUES[list(ids)].sum())]


def drawn(size, seed):
    return [(seed + k) % 4 for k in range(size)]


METHODS = {"top": TopK().select(VALUES, budget=3), "ids": (2, 1, 0, 3), "random": drawn}


def test_every_method_at_every_size_against_the_baseline():
    found = selection_curves(Retraining(loss, progress=False), METHODS, [3, 1], 3)
    assert (found.sizes, found.methods, found.seeds) == ((1, 3), ("top", "ids", "random"), (0, 1, 2))
    prefix = {"top": (1, 3, 2), "ids": (2, 1, 0)}
    for size in (1, 3):
        base = [sum(loss(drawn(size, seed), seed)) / 2 for seed in range(3)]
        assert found.point("random", size).losses == pytest.approx(base)
        assert found.point("random", size).gain is None
        for method, ids in prefix.items():
            point = found.point(method, size)
            expected = [sum(loss(ids[:size], seed)) / 2 for seed in range(3)]
            assert point.losses == pytest.approx(expected)
            assert point.mean == pytest.approx(sum(expected) / 3)
            ends = stats.t.interval(0.95, 2, point.mean, stats.sem(expected))
            assert point.interval == pytest.approx(ends, abs=1e-6)
            gains = [a - b for a, b in zip(expected, base, strict=True)]
            assert point.gain == pytest.approx(sum(gains) / 3)
            ends = stats.t.interval(0.95, 2, point.gain, stats.sem(gains))
            assert point.gain_interval == pytest.approx(ends, abs=1e-6)
    assert [(row["method"], row["size"]) for row in found.rows()][:3] == [("top", 1), ("top", 3), ("ids", 1)]
    lines = str(found).splitlines()
    assert lines[0].split(" | ")[1:3] == ["1 rows                 ".strip(), "3 rows"] or "minus random" in lines[0]
    assert [line.split()[0] for line in lines[2:]] == ["top", "ids", "random"]


def test_trainings_are_kept(tmp_path):
    path = tmp_path / "curves.jsonl"
    first = selection_curves(Retraining(loss, path=path, progress=False), METHODS, [1, 2], 2)
    again = selection_curves(Retraining(Counted(stop=0), path=path, progress=False), METHODS, [1, 2], 2)
    assert first == again


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"baseline": "none"}, r"\(baseline='none'\)`: expected the name of a method among"),
        ({"sizes": []}, r"\(sizes=\[\]\)`: expected ints >= 1"),
        ({"sizes": [0.5]}, "expected ints >= 1"),
        ({"sizes": [4]}, "'top' has 3 rows where 4 were asked for"),
        ({"seeds": 0}, "expected an int >= 1, or different ints"),
    ],
)
def test_what_cannot_be_trained(options, message):
    given = {"sizes": [1], "seeds": 1} | options
    with pytest.raises(ValueError, match=message):
        selection_curves(Retraining(Counted(stop=0), progress=False), METHODS, **given)


def test_unknown_point():
    found = selection_curves(Retraining(loss, progress=False), METHODS, [1], 1)
    with pytest.raises(ValueError, match=r"point\('top', 2\)`: expected one of .*top.* and \(1,\)"):
        found.point("top", 2)
