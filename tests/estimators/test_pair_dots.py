"""Products of pairs against gradients of single examples, however they are batched, ordered, kept and resumed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from lightning_influence import ExampleLoader, GradientDot, LanguageModelLoss, Store
from lightning_influence.errors import StoreError
from lightning_influence.estimators import pair_dots
from lightning_influence.estimators.component_dots import ComponentDots
from tests import oracles
from tests.capture import models
from tests.capture.models import VOCABULARY
from tests.curvature.models import Mixed, mlp, points, ready, token_rows
from tests.estimators.test_gradient_dot import flat

Row = dict[str, Tensor]


class Collate:
    """Pads on one side."""

    def __init__(self, side: str = "right") -> None:
        self.side = side

    def __call__(self, rows: list[Row]) -> Row:
        def padded(key: str, fill: int) -> Tensor:
            return pad_sequence([row[key] for row in rows], True, fill, self.side)

        ids = padded("input_ids", 0)
        mask = pad_sequence([torch.ones_like(row["input_ids"]) for row in rows], True, 0, self.side)
        return {"input_ids": ids, "attention_mask": mask, "labels": padded("labels", -100)}


def sentences(n: int, seed: int = 0, longest: int = 9) -> list[Row]:
    """Sequences of 2 tokens and more; the labels of a prompt are masked."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for k in range(n):
        tokens = torch.randint(1, VOCABULARY, (2 + (3 * k + seed) % (longest - 1),), generator=generator)
        labels = tokens.clone()
        labels[: len(tokens) // 2] = -100
        rows.append({"input_ids": tokens, "labels": labels})
    return rows


def loader(rows: list[Row], side: str = "right") -> DataLoader[Row]:
    return DataLoader(rows, batch_size=4, collate_fn=Collate(side))


def truth(model: nn.Module, rows: list[Row], names: dict[str, list[str]]) -> dict[str, Tensor]:
    """Gradients [n, P_c] of each component, one backward pass per row."""

    def loss(k: int) -> Tensor:
        return models.causal_losses(model, Collate()([rows[k]])).sum()

    parameters = dict(model.named_parameters())
    used = {name: parameters[name] for found in names.values() for name in found}
    found = oracles.example_gradients(used, loss, len(rows))
    return {c: torch.cat([found[name].flatten(1) for name in own], dim=1) for c, own in names.items()}


def assert_true(found: ComponentDots, model: nn.Module, queries: list[Row], train: list[Row], tolerance: float) -> None:
    estimator = GradientDot(model, components=list(found.components))
    names = {c.name: list(c.parameters) for c in estimator.components}
    left, right = truth(model, queries, names), truth(model, train, names)
    ids = torch.tensor(found.train_ids)
    rows, columns = found.pairs[:, 0], ids[found.pairs[:, 1]]
    for k, name in enumerate(found.components):
        a, b = left[name], right[name]
        scale = float((a.norm(dim=1).max() * b.norm(dim=1).max()).clamp_min(1e-12))
        close = {"rtol": 0.0, "atol": tolerance * scale}
        torch.testing.assert_close(found.dots[k], (a[rows] * b[columns]).sum(1), **close, check_dtype=False)
        squares = {"rtol": 10 * tolerance, "atol": tolerance * scale, "check_dtype": False}
        torch.testing.assert_close(found.query_squares[k], a.square().sum(1), **squares)
        torch.testing.assert_close(found.train_squares[k], b[ids].square().sum(1), **squares)


CANDIDATES = [[0, 4], [4, 1, 5], [2], [5, 0], [3, 1]]
QUERIES, TRAIN = sentences(5, seed=3), sentences(6)


def lora(build: Callable[..., nn.Module] = models.llama) -> nn.Module:
    config = LoraConfig(r=2, lora_dropout=0.1, target_modules=["q_proj", "v_proj", "down_proj"])
    return models.ready(get_peft_model(build(), config))


def checkpointed() -> nn.Module:
    model = models.llama()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


BUILDS: dict[str, Callable[[], nn.Module]] = {
    "tied embedding, grouped queries": models.llama,
    "untied, biases": lambda: models.llama(tie_word_embeddings=False, attention_bias=True, mlp_bias=True),
    "gpt2: Conv1D, positions": models.gpt2,
    "lora": lora,
    "gradient checkpointing": checkpointed,
}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", BUILDS)
def test_language_models(name: str) -> None:
    model = BUILDS[name]()
    found = GradientDot(model, progress=False).pairs(loader(QUERIES), loader(TRAIN), CANDIDATES)
    assert found.candidates() == CANDIDATES
    assert len(found.components) == len(GradientDot(model).components)
    assert_true(found, model, QUERIES, TRAIN, 1e-10)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compiled_and_mixed_precision(dtype: str) -> None:
    torch._dynamo.reset()
    plain, model = models.llama().float(), torch.compile(models.llama().float(), backend="aot_eager")
    models.causal_losses(model, Collate()(TRAIN[:2])).sum().backward()  # warm
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        found = GradientDot(model, LanguageModelLoss()).pairs(loader(QUERIES), loader(TRAIN), CANDIDATES)
    assert found.dots.dtype == torch.float32
    wide = GradientDot(plain.double(), LanguageModelLoss()).pairs(loader(QUERIES), loader(TRAIN), CANDIDATES)
    tolerance = 1e-5 if dtype == "float32" else 0.05
    torch.testing.assert_close(found.cosine(), wide.cosine(), rtol=0, atol=tolerance)


def test_float32_is_exact_to_1e_5() -> None:
    model = models.llama()
    single = GradientDot(models.llama().float()).pairs(loader(QUERIES), loader(TRAIN), CANDIDATES)
    assert_true(single, model, QUERIES, TRAIN, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_kept_may_be_rounded(dtype: torch.dtype) -> None:
    model = models.llama().float()
    full = GradientDot(model).pairs(loader(QUERIES), loader(TRAIN), CANDIDATES)
    half = GradientDot(model).pairs(loader(QUERIES), loader(TRAIN), CANDIDATES, dtype=dtype)
    assert half.dots.dtype == torch.float32
    assert not torch.equal(half.dots, full.dots)
    torch.testing.assert_close(half.cosine(), full.cosine(), rtol=0, atol=0.01)


# Invariances


@given(
    q=st.integers(1, 4),
    n=st.integers(1, 5),
    t=st.integers(2, 12),
    tokens=st.integers(1, 60),
    most=st.none() | st.integers(1, 4),
    room=st.floats(0, 1),
    side=st.sampled_from(["left", "right"]),
    data=st.data(),
)
@settings(max_examples=25, deadline=None)
def test_batches_budgets_and_padding_do_not_matter(
    q: int, n: int, t: int, tokens: int, most: int | None, room: float, side: str, data: st.DataObject
) -> None:
    model = models.llama(num_hidden_layers=1)
    queries, train = sentences(q, seed=1, longest=t), sentences(n, seed=2, longest=t)
    ids = st.lists(st.integers(0, n - 1), min_size=1, unique=True)
    candidates = data.draw(st.none() | st.lists(ids, min_size=q, max_size=q))
    estimator = GradientDot(model, memory_budget=int(40_000 + room * 400_000), batch_size=most, progress=False)
    found = estimator.pairs(loader(queries, side), loader(train, side), candidates, batch_positions=tokens)
    assert found.candidates() == ([list(range(n))] * q if candidates is None else candidates)
    # Angles of rotary positions are kept in float32, so padding on the left shifts them by a rounding.
    assert_true(found, model, queries, train, 1e-10 if side == "right" else 1e-5)


@given(order=st.permutations(range(6)), rows=st.permutations(range(5)))
@settings(max_examples=10, deadline=None)
def test_order_does_not_matter(order: list[int], rows: list[int]) -> None:
    model = models.gpt2(n_layer=1)
    expected = GradientDot(model).pairs(loader(QUERIES), loader(TRAIN), CANDIDATES)
    queries = ExampleLoader(loader(QUERIES), indices=rows)
    train = ExampleLoader(loader(TRAIN), indices=order)
    found = GradientDot(model).pairs(queries, train, [CANDIDATES[k] for k in rows])
    assert found.query_ids == tuple(rows)
    assert list(found.train_ids) == [k for k in order if k in expected.train_ids]
    before = {(a, b): expected.dots[:, k] for k, (a, b) in enumerate(named(expected))}
    for k, pair in enumerate(named(found)):
        torch.testing.assert_close(found.dots[:, k], before[pair], rtol=1e-9, atol=1e-12)


def named(dots: ComponentDots) -> list[tuple[Any, Any]]:
    return [(dots.query_ids[a], dots.train_ids[b]) for a, b in dots.pairs.tolist()]


@pytest.mark.parametrize(("build", "rows"), [(mlp, points), (lambda: ready(Mixed()), token_rows)])
def test_any_model(build: Callable[[], nn.Module], rows: Callable[..., list[Any]]) -> None:
    """Two-dimensional inputs, norms, grouped convolutions, tied weights: as the dense scores have it."""
    model, queries, train = build(), rows(4, seed=3), rows(9)
    found = GradientDot(model).pairs(queries, train)
    a, b = flat(model, queries), flat(model, train)
    torch.testing.assert_close(found.total().reshape(4, 9), a @ b.T)
    torch.testing.assert_close(
        found.cosine().reshape(4, 9), nn.functional.cosine_similarity(a[:, None], b[None], dim=2)
    )
    apart = GradientDot(model).score(queries, train, per_component=True)
    torch.testing.assert_close(found.dots.reshape(apart.values.shape), apart.values)


def test_each_example_is_passed_about_once(monkeypatch: pytest.MonkeyPatch) -> None:
    passed: list[int] = []
    original = pair_dots.PairDots.records

    def counted(self: Any, side: int, rows: list[int]) -> Any:
        passed.extend((side, row) for row in rows)
        return original(self, side, rows)

    monkeypatch.setattr(pair_dots.PairDots, "records", counted)
    GradientDot(models.llama()).pairs(loader(QUERIES), loader(TRAIN), CANDIDATES)
    assert sorted(passed[1:]) == [(0, k) for k in range(5)] + [(1, k) for k in range(6)]  # the first: a look at one


# Stores


def store_at(path: Path, model: nn.Module) -> Store:
    return Store.resume(path, model, GradientDot(model).components)


def run(store: Store, model: nn.Module, candidates: Any = CANDIDATES, budget: int = 200_000) -> ComponentDots:
    estimator = GradientDot(model, memory_budget=budget, progress=False)
    return estimator.pairs(loader(QUERIES), loader(TRAIN), candidates, store=store, batch_positions=12)


def contents(path: Path) -> dict[str, bytes]:
    return {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}


@pytest.mark.parametrize("killed_at", [2, 3, 5, 8])
def test_a_killed_run_resumes_and_ends_with_the_same_bytes(
    tmp_path: Path, killed_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pair_dots, "SHARD", 2)
    model = models.llama()
    expected = run(store_at(tmp_path / "whole", model), model)
    calls: list[int] = []
    original = pair_dots.PairDots.records

    def dying(self: Any, side: int, rows: list[int]) -> Any:
        calls.append(1)
        if len(calls) == killed_at:
            raise KeyboardInterrupt
        return original(self, side, rows)

    with monkeypatch.context() as patch:
        patch.setattr(pair_dots.PairDots, "records", dying)
        with pytest.raises(KeyboardInterrupt):
            run(store_at(tmp_path / "killed", model), model)
    found = run(store_at(tmp_path / "killed", model), model)
    assert torch.equal(found.dots, expected.dots)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_what_is_there_is_not_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.llama()
    store = store_at(tmp_path / "store", model)
    expected = run(store, model)
    calls: list[int] = []
    original = pair_dots.PairDots.records
    monkeypatch.setattr(pair_dots.PairDots, "records", lambda *a: (calls.append(1), original(*a))[1])
    assert torch.equal(run(store, model).dots, expected.dots)
    assert len(calls) == 1  # a look at one example
    loaded = ComponentDots.load(Store.open(store.path))
    assert torch.equal(loaded.dots, expected.dots)
    assert torch.equal(loaded.train_squares, expected.train_squares)
    assert loaded.candidates() == CANDIDATES


def test_a_store_of_other_pairs_is_refused(tmp_path: Path) -> None:
    model = models.llama()
    store = store_at(tmp_path / "store", model)
    run(store, model)
    with pytest.raises(StoreError, match=r"ids of rows 'component_dots\.pairs'"):
        run(store, model, [row[:1] for row in CANDIDATES])
    rounded = GradientDot(model, memory_budget=200_000, progress=False)
    with pytest.raises(
        StoreError, match=r"dtype of rows 'component_dots\.pairs': stored 'None', asked 'torch.bfloat16'"
    ):
        rounded.pairs(loader(QUERIES), loader(TRAIN), CANDIDATES, store=store, batch_positions=12, dtype=torch.bfloat16)


# Bad input


def test_bad_input_is_refused_before_any_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair_dots.PairDots, "records", lambda *a: pytest.fail("a pass"))
    estimator = GradientDot(models.llama())
    masked = [*QUERIES[:4], {**QUERIES[4], "labels": torch.full_like(QUERIES[4]["labels"], -100)}]
    for queries, candidates, options, text in (
        (QUERIES, [[0]] * 4, {}, "one list for each of 5 queries, got 4"),
        (QUERIES, [[0], [], [1], [1], [1]], {}, r"without a candidate \(queries \[1\]\)"),
        (QUERIES, [[6]] * 5, {}, "not in the training data"),
        (QUERIES, [[1, 1]] * 5, {}, "with an id twice"),
        (masked, None, {}, r"no supervised target \(ids \[4\]\)"),
        (QUERIES, None, {"batch_positions": 0}, r"batch_positions=0.*expected an int >= 1"),
    ):
        with pytest.raises(ValueError, match=text):
            estimator.pairs(loader(queries), loader(TRAIN), candidates, **options)


def test_a_budget_below_a_pair_is_refused() -> None:
    with pytest.raises(ValueError, match=r"memory_budget=1000: .* expected a budget of at least \d+ bytes"):
        GradientDot(models.llama(), memory_budget=1000).pairs(loader(QUERIES), loader(TRAIN), CANDIDATES)


def test_a_loss_that_is_not_finite_names_the_example() -> None:
    class Broken(LanguageModelLoss):
        def losses(self, model: nn.Module, batch: Row) -> Tensor:
            losses = super().losses(model, batch)
            return torch.where(batch["attention_mask"].sum(1) == len(TRAIN[3]["input_ids"]), torch.nan, losses)

    with pytest.raises(ValueError, match=r"not finite \(ids \["):
        GradientDot(models.llama(), Broken()).pairs(loader(QUERIES), loader(TRAIN), CANDIDATES)
