from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_influence.capture import GradientCapture, parameter_gradients
from lightning_influence.capture.unfit import UnfitExamplesError
from lightning_influence.errors import UnsupportedLayerError
from tests.capture import models
from tests.capture.comparison import Losses, assert_same, gradients, one_point, one_text, truth
from tests.capture.models import Laid, Mlp, causal_losses, class_losses, points, sequences, text
from tests.cases import Prefixed

# Losses


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        (
            lambda m, b: class_losses(m, b).mean(),
            r"a batch of 4 examples has shape \(\); expected one loss per example, \[4\]",
        ),
        (lambda m, b: class_losses(m, b)[:2], r"has shape \(2,\); expected one loss"),
        (lambda m, b: None, r"has shape NoneType; expected one loss"),
        (lambda m, b: class_losses(m, b).detach(), r"the losses do not depend on any component: is the loss detached"),
        (
            lambda m, b: class_losses(m, b) / torch.tensor([1.0, 0, 1, 0]),
            r"2 of 4 examples is not finite \(ids \[11, 13\]\)",
        ),
        (lambda m, b: class_losses(m, b) * float("nan"), r"4 of 4 examples is not finite \(ids \[10, 11, 12, 13\]\)"),
    ],
    ids=["mean", "too few", "none", "detached", "infinite", "nan"],
)
def test_losses_must_be_one_finite_number_per_example(losses: Losses, message: str) -> None:
    with GradientCapture(Mlp()) as capture, pytest.raises(ValueError, match=message):
        next(capture.record(points(4), losses, torch.arange(10, 14)))


def test_ids_must_fit_the_batch() -> None:
    with (
        GradientCapture(Mlp()) as capture,
        pytest.raises(ValueError, match=r"record\(ids\): got shape \(3,\) for 4 examples"),
    ):
        next(capture.record(points(4), class_losses, torch.arange(3)))


def test_records_carry_the_ids_and_the_mask() -> None:
    mask = torch.arange(6) < torch.tensor([[6], [2]])
    with GradientCapture(models.ready(Laid("flat")), "head") as capture:
        [record] = capture.record(sequences(2), class_losses, torch.tensor([7, 3]), mask)
    assert record.ids.tolist() == [7, 3]
    assert record.mask is None  # the head sees one position

    def losses(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).square().sum((1, 2))

    with GradientCapture(nn.Linear(3, 4)) as capture:
        [record] = capture.record(sequences(2)[0].float(), losses, mask=mask)
    assert torch.equal(record.mask, mask)


# What surrounds a recording


def test_modes_and_hooks_are_restored_when_something_fails() -> None:
    model = Mlp(nn.Linear(3, 4), nn.Dropout(0.5), nn.BatchNorm1d(4)).train()
    model.layers[2].eval()  # frozen in evaluation mode
    seen = []

    def failing(model: nn.Module, batch: Any) -> Tensor:
        seen.extend(module.training for module in model.modules())
        raise KeyError("labels")

    with pytest.raises(UnfitExamplesError, match="KeyError: 'labels'"), GradientCapture(model) as capture:
        next(capture.record(points(4), failing))
    assert not any(seen)
    assert [module.training for module in model.modules()] == [True, True, True, True, False]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_nothing_of_the_model_changes() -> None:
    model = models.ready(models.gpt2()).train()
    model.lm_head.requires_grad_(False)
    for k, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, k) if k % 2 else None
    values, trainable = copy.deepcopy(model.state_dict()), [p.requires_grad for p in model.parameters()]
    state = torch.random.get_rng_state()
    gradients(model, text(), causal_losses)
    torch.testing.assert_close(model.state_dict(), values, rtol=0, atol=0)
    assert [p.requires_grad for p in model.parameters()] == trainable
    for k, parameter in enumerate(model.parameters()):
        assert parameter.grad is None if k % 2 == 0 else torch.equal(parameter.grad, torch.full_like(parameter, k))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_weight_gradients_are_not_computed() -> None:
    batch = torch.randn(4, 6, 8)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 2))

    def losses(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).square().sum((1, 2))

    with GradientCapture(model) as capture:
        list(capture.record(batch, losses))  # the first batch is passed backward twice
        with FlopCounterMode(display=False) as counter:
            list(capture.record(batch, losses))
    forward = 2 * 4 * 6 * (8 * 16 + 16 * 32 + 32 * 2)
    by_the_inputs = 2 * 4 * 6 * (32 * 2 + 32 * 16)  # the gradient by the batch itself is not needed either
    assert counter.get_total_flops() == forward + by_the_inputs


def test_a_copy_made_while_attached_is_independent() -> None:
    model = Mlp()
    expected = gradients(model, points(4), class_losses)
    with GradientCapture(model) as capture:
        twin = copy.deepcopy(model)
        twin(points(4)[0]).sum().backward()

        def losses(model: nn.Module, batch: Any) -> Tensor:
            return class_losses(model, batch) + 0 * twin(batch[0]).sum(1)

        first, second = capture.record(points(4), losses)
    assert all(parameter.grad is None for parameter in model.parameters())
    torch.testing.assert_close(first.example_gradients()[:, :, :-1], expected["layers.0.weight"])
    torch.testing.assert_close(second.example_gradients()[:, :, -1], expected["layers.2.bias"])


def test_hooks_of_others_see_what_they_always_see_and_count() -> None:
    """They change what a layer gets and returns; a formula holds in between, a repeated call around them."""

    def doubled(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output * 2

    def shifted(module: nn.Module, args: Any) -> Any:
        return (args[0] + 1,)

    model = models.ready(Mlp(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.LayerNorm(4)))
    for layer in model.layers:
        layer.register_forward_hook(doubled)
        layer.register_forward_pre_hook(shifted)
    assert_same(gradients(model, points(4), class_losses), truth(model, points(4), class_losses, one_point, 4))
    norm = models.llama(num_hidden_layers=1)
    norm.model.norm.register_forward_hook(doubled)
    assert_same(gradients(norm, text(), causal_losses), truth(norm, text(), causal_losses, one_text, 3), 1e-9)


def test_recordings_can_be_interleaved_and_abandoned() -> None:
    one, two = Mlp(), Mlp()
    with GradientCapture(one) as left, GradientCapture(two) as right:
        for a, b in zip(left.record(points(4), class_losses), right.record(points(4), class_losses), strict=True):
            assert torch.equal(a.example_gradients(), b.example_gradients())
            assert torch.is_grad_enabled()
        next(left.record(points(4), class_losses))
        assert len(list(left.record(points(5), class_losses))) == 2
    assert torch.is_grad_enabled()


def test_a_capture_is_used_as_a_context_and_once_at_a_time() -> None:
    capture = GradientCapture(Mlp())
    with pytest.raises(RuntimeError, match="the capture is not active; use it as `with GradientCapture"):
        next(capture.record(points(4), class_losses))
    with capture, pytest.raises(RuntimeError, match="the capture is active already"):
        capture.__enter__()
    for _ in range(2):  # again is fine
        with capture:
            assert len(list(capture.record(points(4), class_losses))) == 2


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_recording_without_gradients_around(context: Callable[[], Any]) -> None:
    model = Mlp()
    expected = gradients(model, points(4), class_losses)
    with context():
        batch = tuple(t.clone() for t in points(4))  # made in inference mode, too
        found = gradients(model, batch, class_losses)
        with torch.inference_mode(False):
            assert_same({name: value.clone() for name, value in found.items()}, expected)


def test_autocast_reaches_the_forward_pass_only() -> None:
    model = models.llama().float()
    exact = gradients(model, text(), causal_losses)
    with torch.autocast("cpu", torch.bfloat16), GradientCapture(model) as capture:
        records = list(capture.record(text(), causal_losses))
        rounded = {}
        for component, record in zip(capture.components, records, strict=True):
            values = record.example_gradients()
            assert values.dtype == record.squared_norms().dtype == record.dot_products(record).dtype == torch.float32
            torch.testing.assert_close(record.squared_norms(), values.flatten(1).square().sum(1), rtol=1e-4, atol=1e-6)
            rounded |= parameter_gradients(model, component, values)
    for name, value in exact.items():
        assert not torch.equal(rounded[name], value)
        assert (rounded[name] - value).norm() < 0.1 * value.norm()


def test_autocast_and_layers_that_are_called_again() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.prefixed, self.attention = Prefixed(), nn.MultiheadAttention(3, 1, batch_first=True)
            self.norm, self.head = nn.BatchNorm1d(3), nn.Linear(3, 4)

        def forward(self, inputs: Tensor) -> Tensor:
            hidden = self.prefixed(inputs)
            return self.head(self.norm(self.attention(hidden, hidden, hidden)[0].mean(1)))

    model, batch = models.ready(Model()).float(), (sequences(4, 5)[0].float(), sequences(4, 5)[1])
    exact = gradients(model, batch, class_losses)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = gradients(model, batch, class_losses)
    for name, value in exact.items():
        assert rounded[name].dtype == torch.float32
        assert (rounded[name] - value).norm() < 0.1 * value.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_models_have_float32_gradients(dtype: torch.dtype) -> None:
    model = models.gpt2()
    exact = gradients(model, text(), causal_losses)
    found = gradients(model.to(dtype), text(), causal_losses)
    for name, value in exact.items():
        assert found[name].dtype == torch.float32
        assert (found[name] - value).norm() < (1e-4 if dtype == torch.float32 else 0.2) * value.norm()


# What is covered


class Spectral(Mlp):
    """Complex parameters have no real gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.ones(3, dtype=torch.cfloat))

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward((inputs * self.filter).real)


def test_what_is_left_out_is_said_once() -> None:
    message = r"GradientCapture: 44 of 47 trainable parameters covered; left out \(6.38 %\): filter. Their influence is"
    with pytest.warns(UserWarning, match=message) as caught:
        capture = GradientCapture(Spectral())
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert capture.coverage.missing == ("filter",)
    with capture:
        for _ in range(2):  # warnings are errors here
            assert len(list(capture.record(points(4), class_losses))) == 2


def test_what_was_not_asked_for_is_no_warning() -> None:
    capture = GradientCapture(Spectral(), "all-linear")
    assert capture.coverage.covered == 44
    assert GradientCapture(Mlp()).coverage.missing == ()


def test_components_can_be_handed_on() -> None:
    model = Mlp()
    components = GradientCapture(model).components
    for given in (components[1:], tuple(components[1:]), iter(components[1:]), "layers.2", ["layers.2"]):
        assert GradientCapture(model, given).components == components[1:]
    with pytest.raises(ValueError, match=r"expected components or names, not both"):
        GradientCapture(model, [components[0], "layers.2"])
    with pytest.raises(ValueError, match=r"2 of 2 components are not those of this Linear"):
        GradientCapture(nn.Linear(3, 4), components)
    with pytest.raises(UnsupportedLayerError, match=r"has no component left"):
        GradientCapture(model, [])


def test_a_batch_of_another_precision_is_told_from_other_failures() -> None:
    with GradientCapture(nn.Linear(2, 1)) as capture:
        with pytest.raises(ValueError, match=r"the batch holds torch\.float64, its parameters are torch\.float32"):
            next(capture.record(torch.ones(3, 2).double(), lambda model, x: model(x).sum(1)))
        with pytest.raises(UnfitExamplesError, match=r"3 of 3 examples .*RuntimeError: mat1 and mat2 shapes"):
            next(capture.record(torch.ones(3, 5), lambda model, x: model(x).sum(1)))
