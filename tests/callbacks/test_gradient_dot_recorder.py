"""What is recorded is what one autograd call per example says, at the weights in the checkpoint's file."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import seed_everything
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_influence.callbacks.gradient_dot_recorder import GradientDotRecorder
from lightning_influence.callbacks.records import find_records
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


def test_given_candidates_only(tmp_path):
    candidates = [[3, 1], [1, 7], [12, 3]]
    recorder = GradientDotRecorder(QUERIES, candidates, when="checkpoint")
    run(tmp_path, [recorder, every_step(tmp_path, 4)], max_epochs=1)
    [record] = recorder.records
    scores = scores_of(record)
    assert scores.train_ids == (1, 3, 7, 12)
    assert Store.open(record.path).read_json("candidates") == candidates
    expected = truth(record.checkpoint, [data()[k] for k in scores.train_ids])
    torch.testing.assert_close(scores.total(), expected, rtol=1e-4, atol=1e-5)


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
    queries = DataLoader(Texts(questions, 9), batch_size=2, collate_fn=collate)
    recorder = GradientDotRecorder(queries, 3, text=text, when="fit_end")
    pool = DataLoader(Texts(WORDS, 0), batch_size=4, collate_fn=collate)
    trainer(tmp_path, [recorder], max_epochs=1, enable_checkpointing=False).fit(Toy(), pool, loader(8))
    store = Store.open(recorder.records[0].path)
    expected = BM25Filter(WORDS).candidates(questions, 3).tolist()
    assert store.read_json("candidates") == expected
    assert Scores.load(store).train_ids == tuple(sorted({k for row in expected for k in row}))


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
        ({"when": "never"}, "expected one of"),
    ],
)
def test_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        GradientDotRecorder(QUERIES, **arguments)


@pytest.mark.parametrize("candidates", [[[0], [1]], [[0], [1], []], [[0], [1], [16]]])
def test_candidates_that_do_not_fit_are_refused_before_training(candidates, tmp_path):
    with pytest.raises(ValueError, match="expected for each of 3 queries at least one position from 0 to 15"):
        run(tmp_path, [GradientDotRecorder(QUERIES, candidates)])
    assert not list(tmp_path.rglob("*.ckpt"))


def test_queries_without_a_loss_are_refused_before_training(tmp_path):
    queries = DataLoader(data(3), collate_fn=lambda rows: {"x": torch.stack([row[0] for row in rows])})
    with pytest.raises(ValueError, match="no per-example loss is known for a batch of type dict"):
        run(tmp_path, [GradientDotRecorder(queries)])
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_two_ranks_record_what_one_does(tmp_path):
    found = []
    for name, settings in (("one", {}), ("two", {"devices": 2, "strategy": "ddp_fork"})):
        seed_everything(1, verbose=False)
        # nothing is learned, so that both runs have the same weights
        callbacks = [GradientDotRecorder(QUERIES, when="fit_end", batch_size=2)]
        model = Toy(lr=0.0)
        model.net[1].momentum = 0.0
        trainer(tmp_path / name, callbacks, max_epochs=1, **settings).fit(model, loader(15))
        [record] = find_records(next((tmp_path / name).rglob("gradient_dot")))
        found.append(scores_of(record))
    one, two = found
    assert two.train_ids == tuple(range(15))
    torch.testing.assert_close(one.values, two.values, rtol=1e-5, atol=1e-6)


def test_scores_are_labelled_without_a_checkpoint(tmp_path):
    recorder = GradientDotRecorder(QUERIES, when="fit_end")
    run(tmp_path, [recorder], enable_checkpointing=False, max_epochs=1)
    assert scores_of(recorder.records[0]).checkpoint == "step=4"
