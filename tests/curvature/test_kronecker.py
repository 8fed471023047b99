"""Factors from a part of the data and in pieces, against dense matrices in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_influence.capture import ExampleLoader, GradientCapture, resolve_loss
from lightning_influence.curvature import EKFAC, KFAC
from lightning_influence.curvature.blocks import KroneckerBlock, piece_sizes
from lightning_influence.curvature.subsample import Subsample
from lightning_influence.store import Store
from tests import oracles
from tests.curvature.models import Mixed, Tokens, normal, ready, texts, token_rows, truth
from tests.curvature.test_blocks import dense, factored, factors, fit

UNITS = ["examples", "tokens"]


def pieces(matrix: Tensor, sizes: list[int]) -> Tensor:
    """The diagonal blocks of a matrix, zeros elsewhere."""
    cut = torch.zeros_like(matrix)
    start = 0
    for size in sizes:
        inside = slice(start, start + size)
        cut[inside, inside] = matrix[inside, inside]
        start += size
    return cut


def in_basis(covariances: tuple[Tensor, Tensor], gradients: Tensor) -> Tensor:
    """E[(Q_S^T g Q_A)^2] in the eigenbasis of given S and A, as a matrix."""
    basis = torch.kron(*(torch.linalg.eigh(c)[1] for c in covariances))
    return basis @ (gradients.flatten(1) @ basis).square().mean(0).diag() @ basis.T


def moments(rows: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """S and A over positions."""
    a, s = (torch.cat(parts) for parts in zip(*rows, strict=True))
    return s.T @ s / len(s), a.T @ a / len(a)


@pytest.mark.parametrize(("width", "sizes"), [(1, [1] * 6), (4, [3, 3]), (5, [3, 3]), (6, [6]), (None, [6])])
@pytest.mark.parametrize("t", [1, 4])
def test_wide_factors_are_diagonal_blocks(width: int | None, sizes: list[int], t: int) -> None:
    record = factored(40, t, 6, 5)
    block = KroneckerBlock(width)
    found = dense(fit(block, record, True), (5, 6))
    s, a = moments(factors(record))
    expected = in_basis((pieces(s, piece_sizes(5, width)), pieces(a, sizes)), record.example_gradients())
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
    largest = max(tensor.shape[0] for key, tensor in block.fitted.items() if "basis" in key)
    assert largest <= (width or 6)


def test_kfac_in_pieces() -> None:
    record = factored(9, 4, 6, 5)
    found = dense(fit(KroneckerBlock(4), record, False), (5, 6))
    s, a = moments(factors(record))
    torch.testing.assert_close(found, 4 * torch.kron(pieces(s, [3, 2]), pieces(a, [3, 3])), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["up", "head"])
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("batch_size", [1, 4, 20])
def test_covariances_of_a_part_and_lambda_of_all(name: str, unit: Any, batch_size: int) -> None:
    model, data = ready(Tokens()), texts(20)
    curvature = EKFAC(fisher="empirical", seed=5, damping=0.05, covariance_share=0.6, covariance_of=unit)
    curvature.fit(model, data, components=["up", "head"], batch_size=batch_size)
    every = truth(model, name, data)
    drawn = []
    for k, (a, s) in enumerate(every.factors):
        kept = Subsample(0.6, unit, 5).positions(torch.tensor([k]), len(a), None)[0]
        drawn.append((a[kept], s[kept]))
    assert 0 < sum(len(a) for a, _ in drawn) < sum(len(a) for a, _ in every.factors)
    [component] = [c for c in curvature.components if c.name == name]
    gradients = normal(2, *component.shape)
    inverse = oracles.damped_inverse(in_basis(moments(drawn), every.gradients), 0.05)
    expected = (gradients.flatten(1) @ inverse).reshape(gradients.shape)
    torch.testing.assert_close(curvature.solve(component, gradients), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("unit", UNITS)
def test_order_and_shards_do_not_matter(unit: Any) -> None:
    data = token_rows(16)
    states = [
        EKFAC(covariance_share=0.5, covariance_of=unit).fit(ready(Mixed()), ExampleLoader(data, size, indices=order))
        for size, order in ((3, list(range(16))), (16, list(range(15, -1, -1))))
    ]
    for component in states[0].components:
        gradients = normal(2, *component.shape)
        one, other = (state.solve(component, gradients) for state in states)
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


def test_components_without_factors_see_everything() -> None:
    """Whatever the share, and although the first pass visits the drawn examples alone."""
    model, data = ready(Mixed()), token_rows(16)
    part, whole = (EKFAC(covariance_share=share).fit(model, data) for share in (0.4, 1.0))
    for component in part.components:
        gradients = normal(2, *component.shape)
        same = torch.allclose(part.solve(component, gradients), whole.solve(component, gradients), rtol=1e-9)
        assert same is (part.blocks[component.name].kind != "kronecker")


def test_kfac_of_a_part_counts_all_positions() -> None:
    """Lambda is scaled by the mean number of positions, of which the drawn ones are a part."""
    model, data = ready(Tokens()), texts(20)
    curvature = KFAC(fisher="empirical", covariance_share=0.999999, covariance_of="tokens").fit(model, data)
    whole = KFAC(fisher="empirical").fit(model, data)
    for name, block in whole.blocks.items():
        torch.testing.assert_close(curvature.blocks[name].eigenvalues(), block.eigenvalues())


def test_nothing_drawn_is_refused_before_the_data_is_seen() -> None:
    with pytest.raises(ValueError, match=r"none of 3 examples was drawn. Expected a larger covariance_share"):
        EKFAC(covariance_share=1e-9).fit(ready(Mixed()), token_rows(3))
    with pytest.raises(ValueError, match=r"no position was drawn for a covariance. Expected a larger"):
        EKFAC(covariance_share=1e-9, covariance_of="tokens").fit(ready(Mixed()), token_rows(3))


def test_a_width_is_checked() -> None:
    for width in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match=r"`KFAC\(max_width=.*expected an int >= 1, or None"):
            KFAC(max_width=width)  # type: ignore[arg-type]


def test_the_store_says_how_the_factors_were_made(tmp_path: Any) -> None:
    model = ready(Mixed())
    curvature = EKFAC(covariance_share=0.5, covariance_of="tokens", max_width=3).fit(model, token_rows(30))
    store = Store.create(tmp_path, model, curvature.components)
    store.write_curvature("c", curvature)
    settings = Store.open(tmp_path).manifest["curvature"]["c"]["settings"]
    assert settings["covariance_share"] == 0.5
    assert settings["covariance_of"] == "tokens"
    assert settings["max_width"] == 3
    found = Store.open(tmp_path).read_curvature("c")
    assert repr(found) == repr(curvature)
    for component in curvature.components:
        gradients = normal(2, *component.shape)
        assert torch.equal(found.solve(component, gradients), curvature.solve(component, gradients))


def test_a_basis_that_was_stored_whole_is_read(tmp_path: Any) -> None:
    """Recordings from before factors could be in pieces."""
    curvature = EKFAC().fit(ready(Mixed()), token_rows())
    old = {key.removesuffix(".0"): value for key, value in curvature.state().items()}
    found = EKFAC()
    found.load_state(curvature.components, old)
    for component in curvature.components:
        gradients = normal(2, *component.shape)
        assert torch.equal(found.solve(component, gradients), curvature.solve(component, gradients))


@pytest.mark.parametrize("t", [1, 2, 40])
@pytest.mark.parametrize("width", [None, 4])
def test_what_is_rotated_from_a_record_is_solved_as_its_gradient(t: int, width: int | None) -> None:
    """Through factors of few positions, or the gradient itself; linear, and of the same length."""
    record = factored(7, t, 6, 5)
    block = fit(KroneckerBlock(width), record, True)
    rotated, gradients = block.rotated(record), record.example_gradients()
    torch.testing.assert_close(rotated.flatten(1).norm(dim=1), gradients.flatten(1).norm(dim=1))
    torch.testing.assert_close(block.solve_rotated(rotated, 0.3), block.solve(gradients, 0.3))
    mean = block.solve_rotated(rotated.mean(0, keepdim=True), 0.3)
    torch.testing.assert_close(mean, block.solve(gradients.mean(0, keepdim=True), 0.3))


@pytest.mark.parametrize("curvature", [EKFAC(), KFAC(damping=0.2)])
def test_rotated_gradients_of_all_components(curvature: EKFAC | KFAC) -> None:
    """Also of those without factors."""
    model, data = ready(Mixed()), token_rows()
    curvature.fit(model, data)
    with GradientCapture(model) as capture:
        for ids, batch in ExampleLoader(data):
            records = capture.record(batch, resolve_loss(model, batch).losses, ids, None, len(ids))
            pairs = list(zip(capture.components, records, strict=True))
    found = curvature.precondition_rotated({c.name: curvature.rotated(c, record) for c, record in pairs})
    expected = curvature.precondition({c.name: record.example_gradients() for c, record in pairs})
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
