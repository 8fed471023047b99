"""What is recorded is what one autograd call per example says, at the weights in the checkpoint's file."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import seed_everything
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence.callbacks.gradient_dot_recorder import GradientDotRecorder
from lightning_influence.callbacks.records import find_records
from lightning_influence.estimators.component_dots import ComponentDots
from lightning_influence.estimators.scores import Scores
from lightning_influence.filters.bm25 import BM25Filter
from lightning_influence.store import Store
from tests.callbacks.toys import Toy, assert_same, data, every_step, fit, loader, run, steps, trainer

QUERIES = data(3, seed=9)


def gradients(model: Toy, dataset) -> torch.Tensor:
    """[n, P], one example at a time."""
    rows = []
    for x, y in dataset:
        parts = torch.autograd.grad(F.cross_entropy(model(x[None]), y[None]), list(model.parameters()))
        rows.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(rows)


def truth(checkpoint: str, train, queries=QUERIES) -> torch.Tensor:
    model = Toy.load_from_checkpoint(checkpoint).eval()
    return gradients(model, queries) @ gradients(model, train).T


def scores_of(record) -> Scores:
    return Scores.load(Store.open(record.path))


def dots_of(record) -> ComponentDots:
    return ComponentDots.load(Store.open(record.path))


def test_all_pairs_at_every_checkpoint(tmp_path):
    recorder = GradientDotRecorder(QUERIES, when="checkpoint", batch_size=5)
    run(tmp_path, [recorder, every_step(tmp_path, 3)])
    assert steps(recorder) == [3, 6]
    for record in recorder.records:
        scores = scores_of(record)
        assert scores.query_ids == (0, 1, 2)
        assert scores.train_ids == tuple(range(16))
        assert scores.components == ("net.0", "net.1", "net.4")
        assert scores.checkpoint == record.checkpoint
        torch.testing.assert_close(scores.total(), truth(record.checkpoint, data()), rtol=1e-4, atol=1e-5)


def test_training_is_bit_identical(tmp_path):
    plain = fit([every_step(tmp_path / "a", 2)], tmp_path)
    recorder = GradientDotRecorder(loader(3, seed=9))
    assert_same(fit([recorder, every_step(tmp_path / "b", 2)], tmp_path), plain)
    assert steps(recorder) == [2, 4, 6, 8]


def test_a_store_says_what_it_is(tmp_path):
    recorder = GradientDotRecorder(QUERIES, when="fit_end", normalise=True, per_component=False, components="net.0")
    model, _ = run(tmp_path, [recorder], max_epochs=1, precision="bf16-mixed")
    store = Store.open(recorder.records[0].path)
    store.verify(model, precision="bf16-mixed", step=4, formula="<g_q, g_i>, unit gradients")
    assert [component.name for component in store.components] == ["net.0"]
    scores = Scores.load(store)
    assert scores.values.shape == (3, 16)
    assert scores.values.abs().max() <= 1
    assert scores.checkpoint is None or "step" in scores.checkpoint


def test_given_candidates_with_self_products(tmp_path):
    candidates = [[3, 1], [1, 7, 0], [12]]
    recorder = GradientDotRecorder(QUERIES, candidates, when="checkpoint")
    run(tmp_path, [recorder, every_step(tmp_path, 2)], max_epochs=1)
    assert steps(recorder) == [2, 4]
    for record in recorder.records:
        dots = dots_of(record)
        assert dots.candidates() == candidates
        assert dots.train_ids == (0, 1, 3, 7, 12)
        assert dots.checkpoint == record.checkpoint
        store = Store.open(record.path)
        assert store.read_json("candidates") == candidates
        assert store.settings["formula"] == dots.formula
        model = Toy.load_from_checkpoint(record.checkpoint).eval()
        left, right = gradients(model, QUERIES), gradients(model, data())
        lengths = left.square().sum(1)[:, None].sqrt() * right.square().sum(1).sqrt()
        at = [(q, i) for q, row in enumerate(candidates) for i in row]
        expected, cosines = (torch.stack([v[q, i] for q, i in at]) for v in (left @ right.T, left @ right.T / lengths))
        torch.testing.assert_close(dots.total().float(), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(dots.cosine().float(), cosines, rtol=1e-4, atol=1e-5)


def test_training_is_bit_identical_with_candidates(tmp_path):
    plain = fit([every_step(tmp_path / "a", 2)], tmp_path)
    recorder = GradientDotRecorder(QUERIES, [[0, 1], [2, 3], [1, 4]], memory_budget=4000, batch_positions=2)
    assert_same(fit([recorder, every_step(tmp_path / "b", 2)], tmp_path), plain)
    assert steps(recorder) == [2, 4, 6, 8]


def test_losses_are_those_of_the_trainers_precision(tmp_path):
    """Autocast in the forward pass, and not in the products: with all pairs the same numbers come out."""
    everything = [list(range(16))] * 3
    dots = GradientDotRecorder(QUERIES, everything, when="fit_end", name="dots")
    scores = GradientDotRecorder(QUERIES, when="fit_end", name="scores")
    run(tmp_path, [dots, scores], max_epochs=1, precision="bf16-mixed")
    found, expected = dots_of(dots.records[0]), scores_of(scores.records[0])
    assert found.dots.dtype == torch.float32
    torch.testing.assert_close(found.dots.reshape(3, 3, 16), expected.values, rtol=1e-2, atol=1e-3)
    model = Toy.load_from_checkpoint(scores.records[0].checkpoint or next(tmp_path.rglob("*.ckpt"))).eval()
    exact = gradients(model, QUERIES) @ gradients(model, data()).T
    assert not torch.allclose(found.total().float().reshape(3, 16), exact, rtol=1e-5, atol=1e-7)


WORDS = ["red apple pie", "green tea", "old blue car", "red car", "apple tree", "tea and pie", "new tree", "blue sea"]


class Texts:
    """Rows that are mappings with a text."""

    def __init__(self, texts: list[str], seed: int) -> None:
        self.texts, self.rows = texts, data(len(texts), seed)

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, k: int) -> dict:
        x, y = self.rows[k]
        return {"x": x, "y": y, "text": self.texts[k]}


def collate(rows: list[dict]):
    return [torch.stack([row["x"] for row in rows]), torch.stack([row["y"] for row in rows])]


@pytest.mark.parametrize("text", ["text", lambda row: row["text"]])
def test_candidates_by_shared_words(text, tmp_path):
    questions = ["a red car", "apple pie"]
    recorder = GradientDotRecorder(Texts(questions, 9), 3, text=text, when="fit_end")  # collated as the pool is
    fit_texts(tmp_path, recorder)
    expected = BM25Filter(WORDS).candidates(questions, 3).tolist()
    assert Store.open(recorder.records[0].path).read_json("candidates") == expected
    assert dots_of(recorder.records[0]).candidates() == expected


def fit_texts(folder, recorder) -> None:
    pool = DataLoader(Texts(WORDS, 0), batch_size=4, collate_fn=collate)
    trainer(folder, [recorder], max_epochs=1, enable_checkpointing=False).fit(Toy(), pool, loader(8))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompt", r"`GradientDotRecorder\(text='prompt'\)`: .* row 0 has the fields \['x', 'y', 'text'\] \(KeyError"),
        ("x", r"`GradientDotRecorder\(text='x'\)`: expected a text for every row; for row 0 got a Tensor"),
    ],
)
def test_what_is_no_text_is_refused_before_training(text, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        fit_texts(tmp_path, GradientDotRecorder(Texts(["a red car"], 9), 3, text=text))
    assert not list(tmp_path.rglob("*.ckpt"))


def test_datasets_are_read_as_the_training_data_is(tmp_path):
    """The collate function and the batch size are those of the training loader, also where `train` is given."""
    sizes = []

    def counted(rows):
        sizes.append(len(rows))
        return collate(rows)

    pool = DataLoader(Texts(WORDS, 0), batch_size=3, collate_fn=counted)
    recorder = GradientDotRecorder(Texts(["tea"] * 5, 9), train=Texts(WORDS, 4), when="fit_end")
    trainer(tmp_path, [recorder], max_epochs=1, enable_checkpointing=False).fit(Toy(), pool, loader(8))
    assert scores_of(recorder.records[0]).values.shape == (3, 5, 8)
    assert max(sizes) == 3


def test_other_training_examples(tmp_path):
    recorder = GradientDotRecorder(QUERIES, train=data(5, seed=3), when="checkpoint")
    run(tmp_path, [recorder, every_step(tmp_path, 4)], max_epochs=1)
    expected = truth(recorder.records[0].checkpoint, data(5, seed=3))
    torch.testing.assert_close(scores_of(recorder.records[0]).total(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"candidates": 3}, r"`GradientDotRecorder\(candidates=3, text=None\)`: expected k >= 1 and the text"),
        ({"candidates": 0, "text": "text"}, "expected k >= 1"),
        ({"candidates": True, "text": "text"}, r"`GradientDotRecorder\(candidates=bool\)`: expected for each query"),
        ({"candidates": "abc"}, r"candidates=str\)`: expected for each query a list of positions"),
        ({"candidates": [0, 1, 2]}, r"candidates=list\)`: expected for each query a list of positions"),
        ({"candidates": [[0]] * 3, "normalise": True}, r"normalise=True\)`: with candidates .*`ComponentDots.cosine"),
        ({"candidates": 2, "text": "t", "per_component": False}, r"per_component=False\)`: with candidates"),
        ({"memory_budget": 0}, r"`GradientDotRecorder\(memory_budget=0\)`: expected an int >= 1"),
        ({"batch_positions": 1.5}, r"`GradientDotRecorder\(batch_positions=1.5\)`: expected an int >= 1"),
        ({"train": "abc"}, r"`GradientDotRecorder\(train=str\)`: .*stable ids"),
        ({"train": []}, r"`GradientDotRecorder\(train=list\)`: .*at least one example"),
        ({"when": "never"}, "expected one of"),
    ],
)
def test_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        GradientDotRecorder(QUERIES, **arguments)


@pytest.mark.parametrize("queries", ["abc", None, 3, iter([1]), {"test": [1]}])
def test_queries_without_positions_are_refused_at_construction(queries):
    with pytest.raises(ValueError, match=r"`GradientDotRecorder\(queries=.*\)`: .*Expected a map-style dataset"):
        GradientDotRecorder(queries)


@pytest.mark.parametrize(
    ("candidates", "message"),
    [
        ([[0], [1]], "expected one list for each of 3 queries, got 2"),
        ([[0], [1], []], r"1 without a candidate \(queries \[2\]\)"),
        ([[0], [1], [16]], r"1 with ids that are not in the training data \(queries \[2\]\)"),
        ([[0], [4, 4], [1]], r"1 with an id twice \(queries \[1\]\)"),
    ],
)
def test_candidates_that_do_not_fit_are_refused_before_training(candidates, message, tmp_path):
    with pytest.raises(ValueError, match=rf"`GradientDotRecorder\(candidates='...'\)`: .*{message}"):
        run(tmp_path, [GradientDotRecorder(QUERIES, candidates)])
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_budget_for_less_than_a_pair_is_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match="memory_budget=10: the gradients of two examples take up to"):
        run(tmp_path, [GradientDotRecorder(QUERIES, [[0]] * 3, memory_budget=10)])
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize("candidates", [None, [[0]] * 5])
def test_a_query_that_is_not_the_first_is_looked_at_before_training(candidates, tmp_path):
    x, y = (tensor.clone() for tensor in data(5, seed=9).tensors)
    x[3] = torch.nan
    with pytest.raises(ValueError, match=r"loss of 1 of 5 queries is not finite \(ids \[3\]\)"):
        run(tmp_path, [GradientDotRecorder(TensorDataset(x, y), candidates)])
    x, y = data(5, seed=9).tensors
    y = y.clone()
    y[4] = -100
    with pytest.raises(ValueError, match=r"1 of 5 queries have no supervised target \(ids \[4\]\)"):
        run(tmp_path, [GradientDotRecorder(TensorDataset(x, y), candidates)])
    assert not list(tmp_path.rglob("*.ckpt"))


def test_queries_without_a_loss_are_refused_before_training(tmp_path):
    queries = DataLoader(data(3), collate_fn=lambda rows: {"x": torch.stack([row[0] for row in rows])})
    with pytest.raises(ValueError, match="no per-example loss is known for a batch of type dict"):
        run(tmp_path, [GradientDotRecorder(queries)])
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`", "ignore:.*the batch holds one example only")
@pytest.mark.parametrize(
    ("queries", "n", "candidates"),
    [
        (3, 15, None),
        (3, 15, [[3, 1], [1, 7, 0], [12]]),
        (1, 15, [[2, 0]]),  # a rank without a query
        (3, 1, None),  # a rank without a training example
    ],
)
def test_two_ranks_record_what_one_does(queries, n, candidates, tmp_path):
    found = []
    for name, settings in (("one", {}), ("two", {"devices": 2, "strategy": "ddp_fork"})):
        seed_everything(1, verbose=False)
        # nothing is learned, so that both runs have the same weights
        train = data(n, seed=2)
        callbacks = [GradientDotRecorder(data(queries, seed=9), candidates, train=train, when="fit_end", batch_size=2)]
        model = Toy(lr=0.0)
        model.net[1].momentum = 0.0
        trainer(tmp_path / name, callbacks, max_epochs=1, **settings).fit(model, loader(15))
        [record] = find_records(next((tmp_path / name).rglob("gradient_dot")))
        found.append(scores_of(record) if candidates is None else dots_of(record))
        assert sorted(p.name for p in record.path.parent.iterdir()) == [
            "step=00000004" if name == "one" else "step=00000002"
        ]
    one, two = found
    assert (two.query_ids, two.train_ids) == (one.query_ids, one.train_ids)
    if candidates is None:
        assert two.train_ids == tuple(range(n))
        torch.testing.assert_close(one.values, two.values, rtol=1e-5, atol=1e-6)
        return
    assert torch.equal(one.pairs, two.pairs)
    for name in ("dots", "query_squares", "train_squares"):
        torch.testing.assert_close(getattr(one, name), getattr(two, name), rtol=1e-5, atol=1e-6)


def test_scores_are_labelled_without_a_checkpoint(tmp_path):
    recorder = GradientDotRecorder(QUERIES, when="fit_end")
    run(tmp_path, [recorder], enable_checkpointing=False, max_epochs=1)
    assert scores_of(recorder.records[0]).checkpoint == "step=4"
