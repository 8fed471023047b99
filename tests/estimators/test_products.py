from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_influence.capture.record import FactoredRecord
from lightning_influence.estimators import products as module
from lightning_influence.estimators.compact import Compactor, Kept, shapes_of
from lightning_influence.estimators.products import products
from tests.estimators.test_compact import batch


def examples(lengths: list[int], pairs: float, dtype: torch.dtype | None = None) -> list[Kept]:
    compactor = Compactor.of(shapes_of(batch(1, 6), 6, 6), 6, pairs, dtype)
    return [compactor.take(batch(1, t, seed=k))[0] for k, t in enumerate(lengths)]


def expected(pairs: list[tuple[Kept, Kept]]) -> Tensor:
    """From the gradients themselves."""

    def dots(left: Kept, right: Kept) -> list[float]:
        records = zip(left.records, right.records, strict=True)
        return [float((a.example_gradients().double() * b.example_gradients().double()).sum()) for a, b in records]

    return torch.tensor([dots(left, right) for left, right in pairs], dtype=torch.float64)


@given(
    lengths=st.lists(st.sampled_from([1, 2, 6, 40]), min_size=1, max_size=5),
    chosen=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=12),
    work=st.sampled_from([1.0, 1e4]),
    together=st.sampled_from([1, 3, 64]),
)
def test_products_are_those_of_the_gradients(
    lengths: list[int], chosen: list[tuple[int, int]], work: float, together: int
) -> None:
    kept = examples(lengths, work)
    pairs = [(kept[a % len(kept)], kept[b % len(kept)]) for a, b in chosen]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "TOGETHER", together)
        found = products(pairs)
    assert found.shape == (len(pairs), 5)
    torch.testing.assert_close(found, expected(pairs), rtol=1e-11, atol=1e-11)


def test_half_precision_is_summed_in_single() -> None:
    kept = examples([3, 6, 5], 1.0, torch.bfloat16)
    pairs = [(kept[0], kept[1]), (kept[1], kept[2]), (kept[0], kept[0])]
    found = products(pairs)
    assert found.dtype == torch.float32
    wide = [Kept(tuple(module._wide(record) for record in one.records)) for one in kept]
    truth = expected([(wide[0], wide[1]), (wide[1], wide[2]), (wide[0], wide[0])])
    torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-5)


def test_an_input_is_multiplied_once_for_all_that_share_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries, keys and values, with something else between them."""
    ids = torch.zeros(1, dtype=torch.int64)

    def example() -> Kept:
        hidden, other = torch.randn(1, 4, 5), torch.randn(1, 4, 6)
        widths = [(hidden, 3), (other, 2), (hidden, 4), (hidden, 2)]
        return Kept(tuple(FactoredRecord(ids, a, torch.randn(1, 4, o)) for a, o in widths))

    made = []
    original = module._Remembered.once

    def counted(self: object, keys: tuple[int, ...], make: object) -> Tensor:
        return original(self, keys, lambda: (made.append(keys), make())[1])

    monkeypatch.setattr(module._Remembered, "once", counted)
    left, right = example(), example()
    found = products([(left, right)])
    assert len(made) == 2
    torch.testing.assert_close(found.double(), expected([(left, right)]), rtol=1e-5, atol=1e-5)
