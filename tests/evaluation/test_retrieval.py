from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from torchmetrics.retrieval import RetrievalMRR, RetrievalRecall

from lightning_influence.evaluation.retrieval import RetrievalSetting, candidate_recall, evaluate_retrieval
from lightning_influence.metrics.intervals import wilson_interval
from lightning_influence.metrics.retrieval import pessimistic_inputs
from lightning_influence.selection.component_cross_validation import cross_validate_components
from lightning_influence.selection.component_pairs import ComponentPairs
from tests.evaluation.retrieval_cases import NAMES, recorded, sources


def truth(dots, wanted, names=None):
    """Ranks by sorting each query's candidates, with ties resolved against the source."""
    cosines, start, ranks = dots.cosine(names).tolist(), 0, []
    for query, ids in zip(dots.query_ids, dots.candidates(), strict=True):
        own = dict(zip(ids, cosines[start : start + len(ids)], strict=True))
        start += len(ids)
        order = sorted(ids, key=lambda i: (-own[i], i == wanted[query]))
        ranks.append(order.index(wanted[query]) + 1)
    return torch.tensor(ranks)


@pytest.mark.parametrize("short", [False, True])
def test_every_line_is_what_sorting_gives(short):
    dots = recorded(short=short)
    report = evaluate_retrieval(RetrievalSetting(dots, sources()), recall_at=(1, 2))
    groups = {
        ("full gradient", ""): NAMES,
        ("kind", "q_proj"): [NAMES[1], NAMES[3]],
        ("kind", "embedding"): [NAMES[0]],
        ("greedy, in-sample", ""): report.choices[""].selection.names,
        **{("component", name): [name] for name in NAMES},
    }
    for (group, name), components in groups.items():
        line, ranks = report.line(group, name), truth(dots, sources(), components)
        assert line.accuracy == line.recall[1] == (ranks == 1).double().mean().item()
        assert line.mrr == pytest.approx((1 / ranks).double().mean().item(), abs=1e-7)
        assert line.recall[2] == (ranks <= 2).double().mean().item()
        assert line.accuracy_interval == wilson_interval(line.accuracy, 40)
        low, high = line.mrr_interval
        assert 0.05 < low < line.mrr < high <= 1
        assert line.components == len(components)
        assert line.share == pytest.approx(sum(dots.sizes[NAMES.index(n)] for n in components) / 1000)


def test_torchmetrics_gives_the_same():
    dots = recorded(noise=6.0)
    line = evaluate_retrieval(RetrievalSetting(dots, sources()), recall_at=(2,)).line("full gradient")
    pairs = ComponentPairs.from_dots(dots, sources())
    mrr, recall = RetrievalMRR(), RetrievalRecall(top_k=2)
    for metric, value in ((mrr, line.mrr), (recall, line.recall[2])):
        metric.update(*pessimistic_inputs(pairs.cosine(), pairs.target))
        assert metric.compute().item() == pytest.approx(value, abs=1e-6)


def test_held_out_is_the_mean_over_the_splits():
    dots = recorded()
    report = evaluate_retrieval(RetrievalSetting(dots, sources()), splits=3, seed=4)
    choice, line = report.choices[""], report.line("greedy, held-out")
    assert choice == cross_validate_components(ComponentPairs.from_dots(dots, sources()), splits=3, seed=4)
    assert line.accuracy == pytest.approx(choice.held_out)
    assert line.accuracy_interval == pytest.approx(choice.interval)
    expected = []
    for split in choice.splits:
        ranks = truth(dots, sources(), split.selection)[list(split.held_out)]
        expected.append((1 / ranks).double().mean().item())
    assert line.mrr == pytest.approx(sum(expected) / 3)
    assert line.mrr_interval[0] < line.mrr < line.mrr_interval[1]
    assert line.components == sum(len(split.selection) for split in choice.splits) / 3


def test_chance():
    line = evaluate_retrieval(RetrievalSetting(recorded(b=4), sources()), candidates=4).line("chance")
    assert (line.accuracy, line.recall) == (0.25, {3: 0.75})
    assert line.mrr == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 4) / 4)
    assert line.accuracy_interval is None
    dots = recorded(short=True)
    counts = [len(ids) for ids in dots.candidates()]
    line = evaluate_retrieval(RetrievalSetting(dots, sources())).line("chance")
    assert line.accuracy == pytest.approx(sum(1 / count for count in counts) / 40)


def test_baselines_and_their_ties():
    dots = recorded()
    shape = (40, 4)
    told = torch.zeros(shape).scatter(1, ComponentPairs.from_dots(dots, sources()).target[:, None], 1.0)
    setting = RetrievalSetting(dots, sources(), baselines={"oracle": told.numpy(), "nothing": told * 0})
    report = evaluate_retrieval(setting)
    assert report.line("baseline", "oracle").accuracy == 1
    assert report.line("baseline", "nothing").accuracy == 0
    assert report.line("baseline", "nothing").mrr == 0.25
    assert report.line("baseline", "oracle").share is None


def test_settings_by_name():
    easy, hard = recorded(noise=0.5), recorded(noise=20.0)
    named = {"paraphrased": RetrievalSetting(easy, sources()), "model-generated": RetrievalSetting(hard, sources())}
    report = evaluate_retrieval(named)
    alone = evaluate_retrieval(named["model-generated"])
    assert [line.setting for line in report.lines][:: len(alone.lines)] == list(named)
    first, second = (report.line("full gradient", setting=name) for name in named)
    assert first.accuracy > 0.95 > 0.6 > second.accuracy
    assert second == replace(alone.line("full gradient"), setting="model-generated")


def test_sources_in_order_or_by_id():
    dots = recorded()
    by_id, in_order = (evaluate_retrieval(RetrievalSetting(dots, s)) for s in (sources(), list(range(40))))
    assert by_id == in_order


def test_queries_of_one_source_are_one_case():
    """Four paraphrases each: as if there were a quarter as many queries."""
    once = recorded(20)
    rows = torch.arange(20).repeat_interleave(4)
    many = replace(
        once,
        query_ids=tuple(f"q{row}.{copy}" for row in range(20) for copy in range(4)),
        pairs=torch.cat(
            [once.pairs.view(20, 4, 2)[int(row)] + torch.tensor([k - row, 0]) for k, row in enumerate(rows)]
        ).view(-1, 2),
        dots=once.dots.view(6, 20, 4)[:, rows].reshape(6, -1),
        query_squares=once.query_squares[:, rows],
    )
    report = evaluate_retrieval(RetrievalSetting(many, rows.tolist()))
    single = evaluate_retrieval(RetrievalSetting(once, list(range(20))))
    for split in report.choices[""].splits:
        assert not {rows[k].item() for k in split.chosen_on} & {rows[k].item() for k in split.held_out}
    line, alone = report.line("full gradient"), single.line("full gradient")
    assert line.accuracy_interval == alone.accuracy_interval
    assert line.mrr_interval == pytest.approx(alone.mrr_interval)
    own = evaluate_retrieval(RetrievalSetting(many, rows.tolist(), groups=range(80)))
    assert own.line("full gradient").accuracy_interval == wilson_interval(line.accuracy, 80)


def test_options_reach_the_choice():
    report = evaluate_retrieval(RetrievalSetting(recorded(), sources()), objective="mrr", splits=2, eps=0.5)
    assert report.choices[""].path.objective == "mrr"
    pairs = ComponentPairs.from_dots(recorded(), sources())
    assert report.choices[""] == cross_validate_components(pairs, "mrr", splits=2, eps=0.5)


GOOD = RetrievalSetting(recorded(), sources())


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        ({}, {}, "`evaluate_retrieval(settings)`: expected a RetrievalSetting, or at least one by name."),
        ({"a": recorded()}, {}, "`evaluate_retrieval(settings)`: expected a RetrievalSetting"),
        (GOOD, {"recall_at": (0,)}, "`evaluate_retrieval(recall_at=[0])`: expected ints >= 1."),
        (GOOD, {"candidates": 1}, "`evaluate_retrieval(candidates=1)`: expected an int >= 2 or None."),
        (GOOD, {"candidates": 5}, "expected 5 candidates for every query; 40 of 40 have another number, such as {'q0'"),
        (GOOD, {"candidates": 5}, "A pool of fewer than 5 examples cannot give 5"),
        (GOOD, {"kinds": {"model.embed": "e"}}, "the nearest to 'model.embed' are ['model.embed_tokens',"),
        (RetrievalSetting(recorded(), {"q0": 0}), {}, "39 of 40 have none, such as ['q1',"),
        (RetrievalSetting(recorded(), [0] * 40), {}, "`must_include`"),
        (RetrievalSetting(recorded(), [99] * 40), {}, "are not in the pool"),
        (RetrievalSetting(recorded(), sources(), [1]), {}, "`RetrievalSetting(groups)`: expected one for each of 40"),
        (
            RetrievalSetting(recorded(), sources(), baselines={"BM25": [[1.0]]}),
            {},
            "`RetrievalSetting(baselines={'BM25': ...})`: expected scores [40, 4], one for each query and candidate",
        ),
        (
            RetrievalSetting(recorded(), sources(), baselines={"BM25": torch.full((40, 4), torch.nan)}),
            {},
            "`RetrievalSetting(baselines={'BM25': ...})`: expected numbers, found NaN for queries [0, 1,",
        ),
    ],
)
def test_what_is_refused(settings, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        evaluate_retrieval(settings, **options)


def test_candidate_recall():
    assert candidate_recall(torch.tensor([[3, 1], [0, 2], [5, 4]]), torch.tensor([1, 1, 5])) == pytest.approx(2 / 3)
    assert candidate_recall([["a"], ["b", "c"]], ["a", "c"]) == 1


@pytest.mark.parametrize(
    ("candidates", "wanted", "message"),
    [
        ([[1], []], [1, 2], "rows without candidates: [1]"),
        ([[1]], [1, 2], "got 1 lists and 2 sources"),
        ([], [], "got 0 lists and 0 sources"),
    ],
)
def test_candidates_without_recall(candidates, wanted, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        candidate_recall(candidates, wanted)
