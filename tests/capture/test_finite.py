from __future__ import annotations

import pytest
import torch

from lightning_influence import EKFAC, ExampleLoader, GradientDot, omit_nonfinite
from lightning_influence.capture.finite import check_gradients, check_nan_policy
from tests.curvature.models import mlp, normal, points


def broken(*places: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    data = points(9)
    for k in places:
        data[k] = (data[k][0] * (torch.nan if k % 2 else torch.inf), data[k][1])
    return data


def test_examples_without_a_finite_loss_are_left_out_and_named() -> None:
    data, model = broken(3, 6), mlp().train()
    with pytest.warns(UserWarning, match=r"2 of 9 examples are left out because .* not finite \(ids \[3, 6\]\)"):
        loader = omit_nonfinite(model, data, batch_size=4)
    assert loader.ids == [0, 1, 2, 4, 5, 7, 8]
    assert loader.omitted == ExampleLoader(loader, 2).omitted == (3, 6)
    assert loader.batch_size == 4
    assert model.training
    scores = GradientDot(model).score(points(2), loader)
    assert scores.train_ids == tuple(loader.ids)
    kept = [data[k] for k in loader.ids]
    torch.testing.assert_close(scores.values, GradientDot(model).score(points(2), kept).values)


def test_nothing_happens_to_clean_data() -> None:
    loader = omit_nonfinite(mlp(), points(9))
    assert loader.ids == list(range(9))
    assert loader.omitted == ()


def test_something_must_be_left() -> None:
    with pytest.raises(ValueError, match="the loss of none of 9 examples is finite; repair the model"):
        omit_nonfinite(mlp(), broken(*range(9)))


def test_a_fit_leaves_them_out_on_request_alone() -> None:
    data = broken(3, 6)
    with pytest.raises(ValueError, match=r"not finite \(ids \[3\]\)"):
        EKFAC().fit(mlp(), data, batch_size=4)
    with pytest.warns(UserWarning, match=r"\(ids \[3, 6\]\)"):
        curvature = EKFAC(fisher="empirical").fit(mlp(), data, batch_size=4, nan_policy="omit")
    assert curvature.omitted == (3, 6)
    expected = EKFAC(fisher="empirical").fit(mlp(), [row for k, row in enumerate(data) if k not in (3, 6)])
    for component in expected.components:
        gradients = normal(2, *component.shape)
        found = curvature.solve(component, gradients)
        torch.testing.assert_close(found, expected.solve(component, gradients), rtol=1e-9, atol=1e-12)


def test_a_policy_is_checked() -> None:
    with pytest.raises(ValueError, match=r"`EKFAC.fit\(nan_policy='drop'\)`: expected 'raise' .* or 'omit'"):
        EKFAC().fit(mlp(), points(), nan_policy="drop")  # type: ignore[arg-type]
    check_nan_policy("x", "omit")


def test_gradients_that_are_no_numbers_are_named() -> None:
    finite = torch.tensor([True, False, True, False])
    check_gradients([5, 6, 7, 8], finite | True, "queries")
    for ids in ([5, 6, 7, 8], torch.arange(5, 9)):
        with pytest.raises(ValueError, match=r"the gradient of 2 of 4 queries is not finite.* \(ids \[6, 8\]\)"):
            check_gradients(ids, finite, "queries")
