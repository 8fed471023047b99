"""What the table and the heat map show is what single components do."""

from __future__ import annotations

import builtins
import csv
import io
from dataclasses import replace

import pytest
import torch

from lightning_influence.estimators.component_dots import ComponentDots
from lightning_influence.report.component_importance import component_importance

NAMES = ("model.embed", "model.layers.0.q", "model.layers.0.up", "model.layers.1.q", "model.layers.1.up")
SOURCES = [2, 0, 4, 5]


def recording(
    seed: int, names=NAMES, lists=((2, 1, 3), (0, 5), (1, 4, 2), (5, 0, 3)), checkpoint=None
) -> ComponentDots:
    """Products of random gradients, each query near its source in some components."""
    generator = torch.Generator().manual_seed(seed)
    c, q, n, r = len(names), len(lists), 6, 4
    train = torch.randn(c, n, r, generator=generator)
    queries = torch.randn(c, q, r, generator=generator) + torch.arange(c)[:, None, None] * train[:, SOURCES[:q]] / 2
    pairs = torch.tensor([(a, i) for a, row in enumerate(lists) for i in row])
    return ComponentDots(
        components=names,
        sizes=tuple(range(1, c + 1)),
        query_ids=tuple(range(q)),
        train_ids=tuple(range(n)),
        pairs=pairs,
        dots=torch.einsum("cpr,cpr->cp", queries[:, pairs[:, 0]], train[:, pairs[:, 1]]),
        query_squares=queries.square().sum(-1),
        train_squares=train.square().sum(-1),
        formula="f",
        reduction="sum",
        checkpoint=checkpoint,
    )


RECORDINGS = [recording(k, checkpoint=f"/runs/epoch=0-step={10 * k}.ckpt") for k in (1, 2, 3)]


def cosines(dots: ComponentDots, component: str | None) -> list[list[float]]:
    """Of each query with its candidates."""
    values = dots.cosine(None if component is None else [component])
    return [values[dots.pairs[:, 0] == query].tolist() for query in range(len(dots.query_ids))]


def rank(values: list[float], candidates: list[int], source: int) -> int:
    own = values[candidates.index(source)]
    return sum(value >= own for value in values)


def brute_force(dots: ComponentDots, component: str | None, measure: str) -> float:
    if measure == "norm_share":
        squares = dots.query_squares.sum(1)
        return 1.0 if component is None else float(squares[dots.components.index(component)] / squares.sum())
    rows, whole = cosines(dots, component), cosines(dots, None)
    if measure == "similarity":
        found = [torch.corrcoef(torch.tensor([a, b]).double())[0, 1] for a, b in zip(rows, whole, strict=True)]
        return float(sum(found) / len(found))
    ranks = [rank(row, ids, s) for row, ids, s in zip(rows, dots.candidates(), SOURCES, strict=True)]
    return sum((r == 1) if measure == "accuracy" else 1 / r for r in ranks) / len(ranks)


@pytest.mark.parametrize("measure", ["accuracy", "mrr", "similarity", "norm_share"])
def test_values_are_those_of_brute_force(measure):
    sources = dict(enumerate(SOURCES)) if measure in ("accuracy", "mrr") else None
    found = component_importance(RECORDINGS, sources, measure=measure)
    assert found.values.shape == (3, 5)
    for k, dots in enumerate(RECORDINGS):
        for c, name in enumerate(NAMES):
            assert float(found.values[k, c]) == pytest.approx(brute_force(dots, name, measure), abs=1e-6)
        assert float(found.whole[k]) == pytest.approx(brute_force(dots, None, measure), abs=1e-6)


def test_the_measure_follows_from_the_sources():
    assert component_importance(RECORDINGS, SOURCES).measure == "accuracy"
    assert component_importance(RECORDINGS).measure == "similarity"


def test_rows_and_csv():
    found = component_importance(RECORDINGS, SOURCES)
    rows = found.rows()
    assert len(rows) == 15
    assert rows[6] == {
        "checkpoint": "step 20",
        "component": "model.layers.0.q",
        "layer": 0,
        "kind": "q",
        "parameters": 2,
        "share": pytest.approx(2 / 15),
        "accuracy": float(found.values[1, 1]),
    }
    read = list(csv.DictReader(io.StringIO(found.csv())))
    assert [row["component"] for row in read[:5]] == list(NAMES)
    assert read[0]["layer"] == ""
    assert [float(row["accuracy"]) for row in read] == found.values.flatten().tolist()


def test_markdown():
    found = component_importance(RECORDINGS, SOURCES)
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in found.markdown().splitlines()]
    assert lines[0] == ["component", "layer", "kind", "parameters", "step 10", "step 20", "step 30"]
    assert lines[2] == ["all together", "", "", "100 %", *(f"{value:.3f}" for value in found.whole.tolist())]
    assert [line[0] for line in lines[3:]] == list(NAMES)
    assert lines[4][1:4] == ["0", "q", "13.3 %"]
    top = found.markdown(top=2).splitlines()
    last = found.values[-1].tolist()
    best = sorted(NAMES, key=lambda name: -last[NAMES.index(name)])[:2]
    assert [line.split("|")[1].strip() for line in top[3:]] == best


def test_cells():
    found = component_importance(RECORDINGS, SOURCES, places={"model.layers.1.up": (0, "up")})
    values, layers, kinds = found.grid()
    assert (layers, kinds) == ([None, 0, 1], ["embedding", "q", "up"])
    assert values[1, 0, 0] == found.values[1, 0]
    assert values[2, 2, 1] == found.values[2, 3]
    torch.testing.assert_close(values[:, 1, 2], found.values[:, [2, 4]].mean(1))
    assert values[0].isnan().tolist() == [[False, True, True], [True, False, False], [True, False, True]]


@pytest.mark.parametrize("number", [1, 3, 5])
def test_heat_map(number, tmp_path):
    pytest.importorskip("matplotlib")
    found = component_importance([RECORDINGS[k % 3] for k in range(number)], SOURCES, labels=list("abcde")[:number])
    figure = found.heat_map(tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size > 1000
    panels = [axes for axes in figure.axes if axes.get_images()]
    values, _, _ = found.grid()
    assert [axes.get_title() for axes in panels] == [
        f"{label} (all: {whole:.3f})" for label, whole in zip("abcde", found.whole.tolist(), strict=False)
    ]
    for axes, expected in zip(panels, values, strict=True):
        [image] = axes.get_images()
        array = image.get_array()
        assert torch.equal(torch.tensor(array.mask.tolist()), expected.isnan())
        assert torch.equal(torch.tensor(array.filled(9.0).tolist(), dtype=torch.float64), expected.nan_to_num(nan=9.0))
        assert image.get_clim() == (0.0, 1.0)
        assert [label.get_text() for label in axes.get_xticklabels()] == ["embedding", "q", "up"]
    assert [label.get_text() for label in panels[0].get_yticklabels()] == ["none", "0", "1"]
    assert figure.canvas.manager is None  # no window, nothing global


def test_without_matplotlib(monkeypatch):
    found = component_importance(RECORDINGS, SOURCES)
    original = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(
        ModuleNotFoundError, match=r'^`heat_map` needs matplotlib.*pip install "lightning-influence\[plots'
    ):
        found.heat_map()


def test_labels_of_checkpoints():
    dots = [
        replace(RECORDINGS[0], checkpoint=place) for place in (None, "step=7", "/a/step=3/last.ckpt", "/a/final.ckpt")
    ]
    assert component_importance(dots).checkpoints == ("checkpoint 1", "step 7", "step 3", "final")
    assert component_importance(dots[:2], labels=["early", "late"]).checkpoints == ("early", "late")


@pytest.mark.parametrize(
    ("recordings", "options", "message"),
    [
        ([], {}, "expected a list of at least one ComponentDots"),
        (RECORDINGS[0], {}, "expected a list of at least one ComponentDots"),
        (["step=3"], {}, "expected a list of at least one ComponentDots"),
        (
            [RECORDINGS[0], recording(1, NAMES[:4])],
            {},
            r"recording 1 differs from the first in \['model.layers.1.up'\]",
        ),
        (RECORDINGS, {"measure": "loss"}, r"`component_importance\(measure='loss'\)`: expected one of"),
        (RECORDINGS, {"measure": "mrr"}, r"measure='mrr'\)`: expected `sources`"),
        (RECORDINGS, {"labels": ["a"]}, "expected one for each of 3 recordings, got 1"),
        (RECORDINGS, {"sources": [2, 0, 4]}, "expected one id for each of 4 queries, got 3"),
        (RECORDINGS, {"sources": [2, 0, 4, 99]}, "not in the pool"),
        ([recording(1, lists=((2, 1), (0,)))], {}, r"at least two candidates .* 1 of 2 have fewer \(queries \[1\]\)"),
    ],
)
def test_refusals(recordings, options, message):
    with pytest.raises(ValueError, match=message):
        component_importance(recordings, **options)
