from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_influence.capture import GradientCapture, parameter_gradients
from lightning_influence.capture.unfit import UnfitExamplesError
from lightning_influence.errors import UnsupportedLayerError
from tests.capture import models
from tests.capture.comparison import assert_same, gradients, one_point, truth
from tests.capture.models import Laid, Mlp, class_losses, points, sequences


class Reused(nn.Module):
    """One layer called twice, a table looked up twice, a norm used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm, self.layer = nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.norm(self.table(inputs).mean(1))
        return self.layer(self.norm(self.layer(hidden).tanh()) + self.table(inputs[:, 0]))


class Tied(nn.Module):
    """An embedding tied to the transposed kind of head, a norm's bias to a linear layer's, two whole layers."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.table, self.head = nn.Embedding(4, 4), Conv1D(4, 4)
        self.head.weight = self.table.weight
        self.norm, self.first, self.second = nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.norm.bias = self.head.bias
        self.second.weight, self.second.bias = self.first.weight, self.first.bias

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.second(self.first(self.table(inputs)).tanh())
        return self.head(self.norm(hidden)).sum(1)


class NanoGpt(nn.Module):
    """Positions looked up once, with indices [t]."""

    def __init__(self, brackets: bool = False) -> None:
        super().__init__()
        self.tokens, self.positions, self.head = nn.Embedding(5, 3), nn.Embedding(8, 3), nn.Linear(3, 4)
        self.brackets = brackets

    def forward(self, inputs: Tensor) -> Tensor:
        places = self.positions(torch.arange(inputs.shape[1]))
        hidden = self.tokens(inputs) + (places[None] if self.brackets else places)
        return self.head(hidden.tanh()).mean(1)


def tokens(n: int, t: int = 6, vocabulary: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    return torch.randint(vocabulary, (n, t), generator=generator), torch.randint(4, (n,), generator=generator)


class Residual(nn.Module):
    """In-place operations where they do no harm: on outputs and on views of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.norm, self.three = nn.Linear(3, 4), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = F.relu(self.one(inputs), inplace=True)
        out = self.two(hidden)
        out[:, 1] *= 2
        out.add_(hidden)
        return self.three(F.relu(self.norm(out), inplace=True))


@pytest.mark.parametrize("n", [1, 4, 6])
@pytest.mark.parametrize(
    ("build", "batch"),
    [
        (lambda: Mlp(nn.Linear(3, 5), nn.ReLU(inplace=True), nn.Linear(5, 4)), points),
        (Residual, points),
        (lambda: Mlp(*[layer := nn.Linear(3, 3), nn.Tanh(), layer, nn.Tanh(), nn.Linear(3, 4)]), points),
        (Reused, tokens),
        (Tied, tokens),
        (lambda: nn.Linear(3, 4), points),
    ],
    ids=["relu in place", "in place", "used twice", "all used twice", "tied", "a layer alone"],
)
def test_traps_for_hooks(build: Callable[[], nn.Module], batch: Callable[[int], Any], n: int) -> None:
    model = models.ready(build())
    assert_same(gradients(model, batch(n), class_losses), truth(model, batch(n), class_losses, one_point, n))


def test_positions_without_a_dimension_for_examples() -> None:
    model = models.ready(NanoGpt())
    with GradientCapture(model) as capture:
        for n in (4, 1, 6):  # 6 = t, when it is already known that those are positions
            found: dict[str, Tensor] = {}
            for component, record in zip(capture.components, capture.record(tokens(n), class_losses), strict=True):
                found |= parameter_gradients(model, component, record.example_gradients())
            assert_same(found, truth(model, tokens(n), class_losses, one_point, n))


def test_positions_that_cannot_be_told_from_examples_are_refused() -> None:
    with pytest.raises(UnsupportedLayerError, match=r"positions: examples mix: row k of its gradient does not follow"):
        gradients(models.ready(NanoGpt()), tokens(6), class_losses)


class Repeated(nn.Module):
    """Repeats the positions itself, by a number that it takes for granted."""

    def __init__(self, silently: bool) -> None:
        super().__init__()
        self.positions, self.head, self.silently = nn.Embedding(8, 3), nn.Linear(3, 4), silently

    def forward(self, inputs: Tensor) -> Tensor:
        places = self.positions(torch.arange(inputs.shape[1])[None])
        rows = places * len(places) if self.silently else places.repeat(len(inputs), 1, 1)
        return self.head((rows + inputs[:, :, None]).tanh()).mean(1)


@pytest.mark.parametrize("silently", [True, False])
def test_rows_that_the_model_does_not_expect_are_refused(silently: bool) -> None:
    with pytest.raises(UnsupportedLayerError, match=r"positions: all examples share its output, and the model does"):
        gradients(models.ready(Repeated(silently)), tokens(4), class_losses)


def test_positions_that_the_model_reshapes_are_refused() -> None:
    with pytest.raises(UnsupportedLayerError, match=r"positions: all examples share its output, and the model does"):
        gradients(models.ready(NanoGpt(brackets=True)), tokens(4), class_losses)


def test_other_errors_of_such_models_are_their_own() -> None:
    def failing(model: nn.Module, batch: Any) -> Tensor:
        return class_losses(model, batch) @ torch.ones(3).double()

    with pytest.raises(UnfitExamplesError, match=r"4 of 4 examples .*RuntimeError: inconsistent tensor size") as error:
        gradients(models.ready(Repeated(silently=True)), tokens(4), failing)
    assert isinstance(error.value.__cause__, RuntimeError)


# Layouts and uses that have no per-example gradient


@pytest.mark.parametrize("layout", ["flat", "time first"])
def test_other_layouts_are_refused_all_at_once(layout: str) -> None:
    with pytest.raises(UnsupportedLayerError) as error:
        gradients(models.ready(Laid(layout)), sequences(4), class_losses)
    text = str(error.value)
    assert text.startswith("2 of 3 modules have no per-example gradient here (52.9 % of the parameters looked at)")
    assert "after: an output has shape" in text
    assert "inner: an output has shape" in text
    assert "expected the 4 examples of the batch in dimension 0" in text
    assert "components=lambda name, module: name not in ['after', 'inner']" in text


def test_time_first_with_as_many_examples_as_steps_is_refused() -> None:
    with pytest.raises(UnsupportedLayerError, match="inner: examples mix"):
        gradients(models.ready(Laid("time first")), sequences(6), class_losses)


def test_the_rest_of_a_model_with_such_a_layer_can_be_recorded() -> None:
    model = models.ready(Laid("flat"))
    found = gradients(model, sequences(4), class_losses, lambda name, module: name not in ["after", "inner"])
    names = {"head.weight", "head.bias"}
    assert_same(found, truth(model, sequences(4), class_losses, one_point, 4, names))


class Changed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(3, 3), nn.Linear(3, 4)
        self.inner.requires_grad_(False)  # otherwise autograd itself complains

    def forward(self, inputs: Tensor) -> Tensor:
        inputs = inputs + 0.0
        hidden = self.inner(inputs)
        inputs.add_(1.0)
        return self.head(hidden + inputs)


def test_an_input_that_is_modified_later_is_refused() -> None:
    model = models.ready(Changed())
    with pytest.raises(UnsupportedLayerError, match=r"inner: its input was modified in place after the layer ran"):
        gradients(model, points(4), class_losses, ["inner", "head"])
    assert set(gradients(model, points(4), class_losses)) == {"head.weight", "head.bias"}


class Partly(nn.Module):
    """One layer is never called, one is called without gradients, one only lends its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle, self.lent, self.blind = (nn.Linear(3, 3) for _ in range(4))
        self.head = nn.Linear(3, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        with torch.no_grad():
            extra = self.blind(inputs)
        return self.head(F.linear(self.used(inputs) + extra, self.lent.weight))


def test_components_that_never_ran_are_named() -> None:
    with pytest.raises(UnsupportedLayerError) as error:
        gradients(models.ready(Partly()), points(4), class_losses)
    text = str(error.value)
    assert text.startswith("3 of 5 modules have no per-example gradient here (56.2 % of the parameters looked at)")
    for name in ("idle", "lent", "blind"):
        assert f"{name}: it never ran in the forward pass" in text
    assert set(gradients(models.ready(Partly()), points(4), class_losses, ["used", "head"])) == {
        "used.weight",
        "used.bias",
        "head.weight",
        "head.bias",
    }


def test_a_module_that_returns_no_tensor_is_refused() -> None:
    class Odd(nn.Linear):
        def forward(self, inputs: Tensor) -> Any:
            return type("Result", (), {"value": super().forward(inputs)})

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.odd, self.head = Odd(3, 3), nn.Linear(3, 4)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.head(self.odd(inputs).value)

    with pytest.raises(UnsupportedLayerError, match="odd: it returned no floating-point tensor"):
        gradients(models.ready(Model()), points(4), class_losses)


def coupled(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """A contrastive loss: every example is compared with all others."""
    features = F.normalize(model(batch[0]), dim=1)
    return F.cross_entropy(features @ features.mT, torch.arange(len(features)), reduction="none")


def test_a_loss_that_compares_examples_is_refused() -> None:
    with pytest.raises(UnsupportedLayerError, match=r"layers\.0: examples mix.* a loss that compares examples"):
        gradients(Mlp(), points(4), coupled)


def test_batch_statistics_are_refused() -> None:
    model = models.ready(Mlp(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False)))
    with pytest.raises(UnsupportedLayerError, match=r"layers\.0: examples mix: .*batch statistics"):
        gradients(model, points(5), class_losses)
