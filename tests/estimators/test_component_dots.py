from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_influence import Store, find_components
from lightning_influence.errors import StoreError
from lightning_influence.estimators.component_dots import ComponentDots

SIZES = (4, 3, 6)
NAMES = ("model.layers.0.q_proj", "model.layers.0.up_proj", "model.layers.1.q_proj")


def gradients(n: int, seed: int) -> list[Tensor]:
    """[n, size] of each component."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, size, generator=generator, dtype=torch.float64) for size in SIZES]


def made(q: int = 3, n: int = 4, pairs: list[tuple[int, int]] | None = None, dtype=torch.float64) -> ComponentDots:
    queries, train = gradients(q, 0), gradients(n, 1)
    chosen = torch.tensor(pairs or [(0, 1), (0, 0), (1, 3), (2, 2), (2, 1), (2, 3)])
    return ComponentDots(
        components=NAMES,
        sizes=SIZES,
        query_ids=tuple(f"q{k}" for k in range(q)),
        train_ids=tuple(range(10, 10 + n)),
        pairs=chosen,
        dots=torch.stack([(a[chosen[:, 0]] * b[chosen[:, 1]]).sum(1) for a, b in zip(queries, train, strict=True)]).to(
            dtype
        ),
        query_squares=torch.stack([a.square().sum(1) for a in queries]).to(dtype),
        train_squares=torch.stack([b.square().sum(1) for b in train]).to(dtype),
        formula="dot",
        reduction="sum",
    )


@given(rows=st.lists(st.integers(0, 2), min_size=1, max_size=3, unique=True))
def test_dots_and_cosines_are_those_of_the_gradients_laid_end_to_end(rows: list[int]) -> None:
    found, names = made(), [NAMES[k] for k in rows]
    left = torch.cat([gradients(3, 0)[k] for k in rows], dim=1)[found.pairs[:, 0]]
    right = torch.cat([gradients(4, 1)[k] for k in rows], dim=1)[found.pairs[:, 1]]
    torch.testing.assert_close(found.total(names), (left * right).sum(1))
    torch.testing.assert_close(found.cosine(names), nn.functional.cosine_similarity(left, right))
    torch.testing.assert_close(found.only(names).cosine(), found.cosine(names))
    assert found.only(names).sizes == tuple(SIZES[k] for k in rows)
    if len(rows) == 3:
        torch.testing.assert_close(found.total(), found.total(names))


def test_epsilon_stands_in_the_denominator() -> None:
    found = made()
    lengths = (
        found.query_squares.sum(0)[found.pairs[:, 0]].sqrt() * found.train_squares.sum(0)[found.pairs[:, 1]].sqrt()
    )
    torch.testing.assert_close(found.cosine(eps=0.5), found.total() / (lengths + 0.5))


def test_without_a_gradient_the_cosine_is_zero() -> None:
    found = made()
    dots, squares = found.dots.clone(), found.query_squares.clone()
    dots[:, :2], squares[:, 0] = 0, 0
    cosines = dataclasses.replace(found, dots=dots, query_squares=squares).cosine()
    assert cosines[:2].tolist() == [0, 0]
    assert cosines[2:].abs().min() > 0


def test_sums_are_taken_in_float64() -> None:
    found = made(dtype=torch.float32)
    assert found.total().dtype == found.cosine().dtype == torch.float64
    assert torch.equal(found.total(), found.dots.double().sum(0))


def test_candidates_keep_the_order_of_the_pairs() -> None:
    assert made().candidates() == [[11, 10], [13], [12, 11, 13]]


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["model.layers.0.q_porj"], r"nearest to 'model.layers.0.q_porj' are \['model.layers.0.q_proj'"),
        ([NAMES[0], NAMES[0]], "each once"),
        ([], "at least one"),
    ],
)
def test_components_that_are_not_there_are_refused(names: list[str], text: str) -> None:
    for ask in (made().total, made().cosine, made().only):
        with pytest.raises(ValueError, match=text):
            ask(names)


def test_labels_must_fit() -> None:
    with pytest.raises(ValueError, match=r"expected shapes .*'dots': \(3, 6\).* got .*'dots': \(3, 5\)"):
        dataclasses.replace(made(), dots=torch.zeros(3, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_they_come_back_from_a_store_as_they_were(tmp_path, dtype: torch.dtype) -> None:
    model = nn.Linear(2, 2)
    store = Store.create(tmp_path / "store", model, find_components(model))
    before = made(dtype=dtype).at("step=3")
    before.save(store)
    after = ComponentDots.load(Store.open(store.path))
    for field in dataclasses.fields(ComponentDots):
        one, other = getattr(before, field.name), getattr(after, field.name)
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other
    assert after.dots.dtype == dtype
    with pytest.raises(StoreError, match="no json 'others'"):
        ComponentDots.load(store, "others")


def test_repr_tells_sizes_not_numbers() -> None:
    assert repr(made()) == (
        "ComponentDots(3 components, 6 pairs, 3 queries, 4 training examples, formula='dot', reduction='sum')"
    )
